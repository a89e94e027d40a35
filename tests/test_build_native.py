"""Native packages: every record, every resident byte, kills, locks and memory."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILY_NAMES, TinyCheckpoint, make_tiny_checkpoint
from hand_plan import fused_copy, hand_plan, random_forms, tree, uniform_forms
from safetensors import safe_open

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters import export_native, packing
from edge_moe.converters.build import build
from edge_moe.converters.packer import Packer
from edge_moe.converters.packing import num_workers, packing_peak_bytes
from edge_moe.converters.safetensors_writer import TensorEntry, safetensors_file
from edge_moe.errors import InputError, TargetError
from edge_moe.formats import pack_expert
from edge_moe.package import Package, is_package
from edge_moe.plan import Plan

FORMS = ("bf16", "drop", "q8_0", "q4_0", "f16")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_records_and_routers(family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family))
    plan = hand_plan(checkpoint, random_forms(checkpoint, FORMS))
    package = Package(build(plan, tmp_path / "out", model=checkpoint.folder))
    assert package.plan == plan
    for layer, row in zip(package.manifest.layers, plan.forms, strict=True):
        assert [record.expert_id for record in layer.experts] == plan.kept(row)
        for record in layer.experts:
            assert record.form == row[record.expert_id]
            expert = checkpoint.expert(layer.layer_id, record.expert_id)
            packed = pack_expert(record.form, *expert).tobytes()
            with (package.folder / record.file).open("rb") as handle:
                handle.seek(record.offset)
                assert handle.read(record.num_bytes) == packed
            assert record.offset % 4096 == 0
            assert zlib.crc32(packed) == record.crc32
    _check_resident(package, checkpoint, plan)


def _check_resident(package: Package, checkpoint: Checkpoint, plan: Plan) -> None:
    kept = {
        name: plan.kept(row)
        for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True)
        for name in checkpoint.spec.router_tensor_names(layer_id)
    }
    with (
        safe_open(package.folder / "resident.safetensors", "pt") as resident,
        safe_open(checkpoint.folder / "model.safetensors", "pt") as source,
    ):
        names = {info.name for info in checkpoint.dense_tensors}
        assert set(resident.keys()) == names
        for name in names:
            expected = source.get_tensor(name)
            expected = expected[kept[name]] if name in kept else expected
            found = resident.get_tensor(name)
            assert found.dtype == expected.dtype
            assert found.equal(expected)


def test_safetensors_library_reads_expert_files(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    plan = hand_plan(checkpoint, random_forms(checkpoint, FORMS))
    package = Package(build(plan, tmp_path / "out", model=checkpoint.folder))
    for layer in package.manifest.layers:
        with safe_open(package.folder / layer.experts[0].file, "np") as opened:
            for record in layer.experts:
                name = f"layers.{layer.layer_id}.experts.{record.expert_id}"
                tensor = opened.get_tensor(name)
                assert tensor.dtype == np.uint8
                assert tensor.size % 4096 == 0
                assert zlib.crc32(tensor[: record.num_bytes]) == record.crc32
                assert not tensor[record.num_bytes :].any()


def test_wide_blocks_pack(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("olmoe", wide=True))
    plan = hand_plan(checkpoint, random_forms(checkpoint, ("q4_k", "drop", "tq1_0", "q2_k")))
    package = Package(build(plan, tmp_path / "out", model=checkpoint.folder))
    forms = {record.form for layer in package.manifest.layers for record in layer.experts}
    assert forms == {"q4_k", "tq1_0", "q2_k"}


def test_stacked_experts_give_the_same_package(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    plain = Checkpoint(tiny_checkpoint("qwen3_moe"))
    fused = Checkpoint(fused_copy(plain.folder, tmp_path / "fused"))
    assert fused.is_fused
    forms = random_forms(plain, FORMS)
    for name, checkpoint in (("a", plain), ("b", fused)):
        build(hand_plan(checkpoint, forms), tmp_path / name, model=checkpoint.folder)
    for file in ("experts-00001.safetensors", "experts-00002.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_sidecar_files_are_copied_byte_for_byte(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "source")
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (source / "LICENSE").write_text("Apache")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("x")
    (source / "pytorch_model.bin").write_bytes(b"weights")
    checkpoint = Checkpoint(source)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4))
    found = tree(build(plan, tmp_path / "out", model=source))
    left_out = {"model.safetensors", "pytorch_model.bin"}
    for name, data in tree(source).items():
        assert (name in found) == (name not in left_out)
        assert name in left_out or found[name] == data


def test_unused_prediction_layers_are_left_out(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_checkpoint("deepseek_v3"), tmp_path / "source")
    entry = TensorEntry("model.layers.3.eh_proj.weight", "BF16", (4, 4))
    with safetensors_file(source / "mtp.safetensors", [entry]) as writer:
        writer.write(entry.name, [bytes(32)])
    weight_map = dict.fromkeys(Checkpoint(source).tensors, "model.safetensors")
    weight_map[entry.name] = "mtp.safetensors"
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(source)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4))
    package = Package(build(plan, tmp_path / "out", model=source))
    with safe_open(package.folder / "resident.safetensors", "np") as resident:
        assert entry.name not in resident.keys()  # noqa: SIM118
    assert "1 tensors of multi-token prediction layers" in (tmp_path / "out/README.md").read_text()


def _killed_build(plan: Plan, output: Path, num_experts: int) -> None:
    """Build in a process that is killed with SIGKILL after `num_experts` experts."""
    plan.save(output.parent / "plan.json")
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from edge_moe.converters import packing
        from edge_moe.converters.build import build
        from edge_moe.plan import Plan

        real, calls = packing.is_stored_as, []
        def is_stored_as(*arguments):
            calls.append(arguments)
            if len(calls) > {num_experts}:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        packing.is_stored_as = is_stored_as
        plan = Plan.load(Path({str(output.parent / "plan.json")!r}))
        build(plan, Path({str(output)!r}), model=Path(plan.model))
    """)
    process = subprocess.run([sys.executable, "-c", script], check=False)
    assert process.returncode == -signal.SIGKILL


def test_killed_build_resumes_to_the_same_bytes(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen2_moe"))
    plan = hand_plan(checkpoint, random_forms(checkpoint, FORMS))
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected = tree(build(plan, tmp_path / "whole" / "out", model=checkpoint.folder))
    output = tmp_path / "killed" / "out"
    first_layer = len(plan.kept(plan.forms[0]))
    _killed_build(plan, output, first_layer + 1)
    assert not output.exists()
    assert not is_package(tmp_path / "killed" / ".out.building" / "output")
    asked: list[int] = []
    real = packing.expert_records

    def counted(
        checkpoint: Checkpoint,
        layer_id: int,
        experts: Sequence[tuple[int, str]],
        packer: Packer,
    ) -> Iterator[Iterable[bytes]]:
        asked.append(layer_id)
        return real(checkpoint, layer_id, experts, packer)

    monkeypatch.setattr(export_native, "expert_records", counted)
    assert tree(build(plan, output, model=checkpoint.folder)) == expected
    assert asked == [plan.moe_layer_ids[1]]
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", "plan.json"]


@pytest.mark.parametrize("row", [["bf16"] * 5 + ["drop"] * 3, (["bf16"] + ["drop"] * 3) * 2])
def test_unequal_and_small_groups_are_refused(
    row: list[str], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """transformers' router takes equal runs of the experts that are left for its groups."""
    checkpoint = Checkpoint(tiny_checkpoint("deepseek_v3"))
    with pytest.raises(TargetError, match="needs the same number of experts, at least 2, in each"):
        build(hand_plan(checkpoint, [row] * 2), tmp_path / "out", model=checkpoint.folder)
    assert not (tmp_path / "out").exists()


def test_unfinished_build_of_another_plan_is_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen2_moe"))
    _killed_build(hand_plan(checkpoint, random_forms(checkpoint, FORMS)), tmp_path / "out", 2)
    other = hand_plan(checkpoint, uniform_forms(checkpoint, 4))
    with pytest.raises(InputError, match=r"\.out\.building holds an unfinished build of another"):
        build(other, tmp_path / "out", model=checkpoint.folder)
    assert (tmp_path / ".out.building").exists()


def test_two_builds_of_one_output_do_not_mix(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("olmoe"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4))
    (tmp_path / ".out.building").mkdir()
    with (tmp_path / ".out.building" / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being built by another process"):
            build(plan, tmp_path / "out", model=checkpoint.folder)
    build(plan, tmp_path / "out", model=checkpoint.folder)


def test_empty_output_folder_is_accepted(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("olmoe"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4))
    (tmp_path / "out").mkdir()
    assert is_package(build(plan, tmp_path / "out", model=checkpoint.folder))


def test_checkpoint_is_found_where_the_plan_says(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("olmoe"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4))
    monkeypatch.chdir(tmp_path)
    assert build(plan, Path("out")) == Path("out")
    assert is_package(tmp_path / "out")


def test_gguf_lies_beside_its_plan(demo_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    checkpoint = Checkpoint(demo_model)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "q8_0"), "gguf")
    output = build(plan, tmp_path / "out", model=demo_model)
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "model.gguf",
        "plan.json",
    ]
    assert (output / "model.gguf").read_bytes().startswith(b"GGUF")
    assert Plan.load(output / "plan.json") == plan


@pytest.mark.parametrize("cores", [1, 4])
def test_memory_is_one_expert_per_core(
    cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "usable_cores", lambda: cores)
    sizes: dict[str, Any] = {"num_experts": 32, "moe_intermediate_size": 1024, "hidden_size": 256}
    folder = make_tiny_checkpoint(tmp_path / "source", "qwen3_moe", num_hidden_layers=1, **sizes)
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, [["q8_0"] * 32])
    build(plan, tmp_path / "first", model=folder)  # loads modules
    tracemalloc.start()
    build(plan, tmp_path / "out", model=folder)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < packing_peak_bytes(checkpoint.spec) + 10**6
    assert (
        tree(tmp_path / "first")["experts-00001.safetensors"]
        == (tmp_path / "out" / "experts-00001.safetensors").read_bytes()
    )


def test_large_experts_are_packed_one_at_a_time(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "usable_cores", lambda: 64)
    spec = Checkpoint(tiny_checkpoint("mixtral")).spec
    assert num_workers(spec) == 64
    large = dataclasses.replace(spec, hidden_size=4096, expert_width=14336)
    assert num_workers(large) == 1


def _memory_cgroup(limit_bytes: int) -> Path:
    """A new memory cgroup with that limit, in whichever version the machine has."""
    for root, limit_name in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"edge-moe-build-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit_name).write_text(str(limit_bytes))
            return group
        except OSError:
            if group.exists():
                group.rmdir()
    pytest.skip("memory cgroups are missing or need root")


def _synthetic_checkpoint(like: Path, folder: Path, width: int, num_experts: int) -> Path:
    """A checkpoint of zeros without building a model: `like` with wider, more experts."""
    folder.mkdir()
    source = Checkpoint(like)
    config = json.loads((like / "config.json").read_text())
    config |= {"num_experts": num_experts, "moe_intermediate_size": width}
    config.pop("num_local_experts", None)
    (folder / "config.json").write_text(json.dumps(config))
    hidden = source.spec.hidden_size
    entries = [
        TensorEntry(info.name, info.dtype, info.shape)
        if not info.name.endswith("mlp.gate.weight")
        else TensorEntry(info.name, info.dtype, (num_experts, hidden))
        for info in source.dense_tensors
    ]
    for layer_id in source.spec.moe_layer_ids:
        for expert_id in range(num_experts):
            gate, up, down = source.spec.expert_tensor_names(layer_id, expert_id)
            entries += [TensorEntry(name, "BF16", (width, hidden)) for name in (gate, up)]
            entries.append(TensorEntry(down, "BF16", (hidden, width)))
    with safetensors_file(folder / "model.safetensors", entries) as writer:
        for entry in entries:
            writer.write(entry.name, [bytes(entry.num_bytes)])
    return folder


@pytest.mark.slow
def test_build_survives_a_memory_limit(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """400 MB of experts become a package within 120 MB of memory, page cache included."""
    folder = _synthetic_checkpoint(
        tiny_checkpoint("qwen3_moe", wide=True), tmp_path / "source", width=2048, num_experts=64
    )
    checkpoint = Checkpoint(folder)
    assert (folder / "model.safetensors").stat().st_size > 400e6
    plan = hand_plan(checkpoint, [["bf16", "q8_0"] * 32] * 2)
    plan.save(tmp_path / "plan.json")
    script = (
        "import os, sys; from pathlib import Path\n"
        "Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from edge_moe.converters.build import build; from edge_moe.plan import Plan\n"
        "plan = Plan.load(Path(sys.argv[2]))\n"
        "build(plan, Path(sys.argv[3]), model=Path(plan.model))\n"
    )
    group = _memory_cgroup(120_000_000)
    try:
        arguments = [str(group), str(tmp_path / "plan.json"), str(tmp_path / "out")]
        process = subprocess.run([sys.executable, "-c", script, *arguments], check=False)
    finally:
        group.rmdir()
    assert process.returncode == 0
    assert is_package(tmp_path / "out")
