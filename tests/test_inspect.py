"""Inspection reads headers only, and its bytes add up to the file."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import FAMILY_NAMES, TinyCheckpoint

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import CheckpointError, InputError
from edge_moe.hub import is_hub_id, local_path, resolve_model
from edge_moe.inspect import ModelInspection, component_of, inspect_model
from edge_moe.safetensors_header import read_header

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "norm_topk_prob": True,
    "torch_dtype": "bfloat16",
}


def sizes(found: ModelInspection) -> dict[str, int]:
    return {part.name: part.num_bytes for part in found.components}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_components_add_up_to_the_file(tiny_checkpoint: TinyCheckpoint, family: str) -> None:
    folder = tiny_checkpoint(family)
    found = inspect_model(str(folder))
    tensors, _ = read_header(folder / "model.safetensors")
    assert found.total_bytes == sum(info.num_bytes for info in tensors.values())
    assert found.total_bytes == sum(sizes(found).values())
    spec = Checkpoint(folder).spec
    assert sizes(found)["routed experts"] == spec.num_moe_layers * 8 * spec.expert_weights * 2
    assert found.active_parameters is not None and found.total_parameters is not None
    idle_weights = spec.num_moe_layers * (8 - 2) * spec.expert_weights
    assert found.total_parameters - found.active_parameters == idle_weights
    assert "other" not in sizes(found)


def test_shared_experts_and_dense_layers_are_told_apart(tiny_checkpoint: TinyCheckpoint) -> None:
    deepseek = sizes(inspect_model(str(tiny_checkpoint("deepseek_v3"))))
    assert deepseek["shared experts"] == 2 * 3 * 64 * 64 * 2  # 2 layers, 3 matrices, bf16
    assert deepseek["dense MLPs"] == 3 * 64 * 128 * 2  # the first layer
    qwen2 = sizes(inspect_model(str(tiny_checkpoint("qwen2_moe"))))
    assert qwen2["shared experts"] == 2 * (3 * 64 * 96 + 64) * 2  # with the shared expert's gate
    assert "dense MLPs" not in qwen2


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "embeddings"),
        ("model.norm.weight", "norms"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.self_attn.kv_a_layernorm.weight", "norms"),
        ("model.layers.0.self_attn.q_proj.bias", "attention"),
        ("model.layers.0.mlp.gate.weight", "routers"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "routers"),
        ("model.layers.0.block_sparse_moe.gate.weight", "routers"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "shared experts"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "shared experts"),
        ("model.layers.0.mlp.gate_proj.weight", "dense MLPs"),
        ("model.rotary.inv_freq", "other"),
    ],
)
def test_component_of(name: str, component: str) -> None:
    assert component_of(name) == component


def test_forms_state_exact_bytes(tiny_checkpoint: TinyCheckpoint) -> None:
    found = inspect_model(str(tiny_checkpoint("qwen3_moe", wide=True)))
    forms = {row.form: row for row in found.forms}
    assert forms["bf16"].expert_bytes == 3 * 256 * 256 * 2
    assert forms["bf16"].token_cycle_bytes == 2 * 2 * forms["bf16"].expert_bytes
    assert forms["q8_0"].expert_bytes == 3 * 256 * 256 // 32 * 34
    narrow = inspect_model(str(tiny_checkpoint("qwen3_moe")))
    assert "q4_k" not in {row.form for row in narrow.forms}  # 64 is no multiple of 256
    targets = {fit.target: fit for fit in narrow.targets}
    assert set(targets) == {"native", "gguf", "hf", "onnx"}
    assert targets["native"].forms[0] == "drop" and targets["native"].forms[-1] == "bf16"
    assert targets["gguf"].limits


def test_a_target_that_cannot_hold_the_model_says_so(tiny_checkpoint: TinyCheckpoint) -> None:
    found = inspect_model(str(tiny_checkpoint("phimoe")))
    gguf = next(fit for fit in found.targets if fit.target == "gguf")
    assert not gguf.forms
    assert "this model by sparsemixer" in gguf.limits[0]


def test_json_round_trips(tiny_checkpoint: TinyCheckpoint) -> None:
    found = inspect_model(str(tiny_checkpoint("mixtral")))
    assert ModelInspection.model_validate_json(found.model_dump_json()) == found


def write_sparse_checkpoint(folder: Path) -> int:
    """61 GB in 18,867 tensors without data: headers, then holes. Returns the bytes."""
    (folder / "config.json").write_text(json.dumps(QWEN3_30B))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for layer in range(48):
        name = f"model-{layer + 1:05}-of-00048.safetensors"
        shapes = qwen3_layer_shapes(layer)
        if layer == 0:
            shapes |= {"model.embed_tokens.weight": (151936, 2048), "model.norm.weight": (2048,)}
            shapes["lm_head.weight"] = (151936, 2048)
        total_bytes += write_sparse_file(folder / name, shapes)
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total_bytes


def qwen3_layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.self_attn.q_proj.weight": (4096, 2048),
        f"{prefix}.self_attn.k_proj.weight": (512, 2048),
        f"{prefix}.self_attn.v_proj.weight": (512, 2048),
        f"{prefix}.self_attn.o_proj.weight": (2048, 4096),
        f"{prefix}.self_attn.q_norm.weight": (128,),
        f"{prefix}.self_attn.k_norm.weight": (128,),
        f"{prefix}.input_layernorm.weight": (2048,),
        f"{prefix}.post_attention_layernorm.weight": (2048,),
        f"{prefix}.mlp.gate.weight": (128, 2048),
    }
    for expert in range(128):
        for name, shape in (("gate", (768, 2048)), ("up", (768, 2048)), ("down", (2048, 768))):
            shapes[f"{prefix}.mlp.experts.{expert}.{name}_proj.weight"] = shape
    return shapes


def write_sparse_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        num_bytes = 2
        for size in shape:
            num_bytes *= size
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(header).encode()
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + end)
    return end


def test_sixty_gigabytes_take_seconds_and_little_memory(tmp_path: Path) -> None:
    total_bytes = write_sparse_checkpoint(tmp_path)
    assert total_bytes == 61_064_245_248  # 30.53 billion bf16 parameters
    code = (
        "import re, sys; from edge_moe.cli import run; code = run(sys.argv[1:]);"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read());"
        "print(peak[1], file=sys.stderr); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = ModelInspection.model_validate_json(done.stdout)
    assert found.total_bytes == total_bytes
    assert found.total_parameters == total_bytes // 2
    assert found.active_parameters is not None
    assert 3.2e9 < found.active_parameters < 3.5e9  # "30B-A3B"
    peak_kilobytes = int(done.stderr)
    assert peak_kilobytes < 100_000
    cpu_seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert cpu_seconds < 3.0  # start-up included; reading 61 GB takes a minute at least


def test_truncated_file_is_one_error(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("olmoe")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated: .* download the file again"):
        inspect_model(str(tmp_path))


@dataclass
class HubTensor:
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass
class HubFile:
    tensors: dict[str, HubTensor]


@dataclass
class HubRepository:
    files_metadata: dict[str, HubFile]


@pytest.fixture
def fake_hub(tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that serves a local folder's config.json and headers, and nothing else."""
    folder = tiny_checkpoint("qwen3_moe")

    def download(repo_id: str, filename: str, revision: str | None = None) -> str:
        assert (repo_id, filename, revision) == ("owner/tiny", "config.json", "v1")
        return str(folder / filename)

    def metadata(repo_id: str, revision: str | None = None) -> HubRepository:
        tensors = read_header(folder / "model.safetensors")[0]
        return HubRepository(
            {
                "model.safetensors": HubFile(
                    {
                        name: HubTensor(info.dtype, list(info.shape), (0, info.num_bytes))
                        for name, info in tensors.items()
                    }
                )
            }
        )

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    return folder


def test_hub_id_is_inspected_from_ranged_reads(fake_hub: Path) -> None:
    remote = inspect_model("owner/tiny", "v1")
    local = inspect_model(str(fake_hub))
    assert remote.kind == "hub"
    assert remote.components == local.components
    assert remote.active_parameters == local.active_parameters


def test_hub_errors_become_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Name or service not known\nRetrying ...")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for look in (lambda: inspect_model("owner/tiny"), lambda: resolve_model("owner/tiny", "v1")):
        with pytest.raises(InputError) as caught:
            look()
        message = str(caught.value)
        assert "owner/tiny" in message and "Name or service not known" in message
        assert "\n" not in message and "give the folder" in message


def test_hub_id_downloads_only_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("owner/tiny", "v1") == tmp_path
    assert calls[0]["revision"] == "v1"
    assert "*.safetensors" in calls[0]["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".gguf")) for pattern in calls[0]["allow_patterns"])


def test_local_paths_are_never_looked_up_on_a_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "out" / "package").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("out/package")
    assert not is_hub_id("out/typo")  # the parent folder exists
    assert not is_hub_id("weights/model.gguf")
    assert not is_hub_id("./a/b")
    assert is_hub_id("Qwen/Qwen3-30B-A3B")
    assert resolve_model("out/package") == Path("out/package")
    with pytest.raises(InputError, match="'out/typo' does not exist: give a checkpoint folder"):
        local_path("out/typo")
