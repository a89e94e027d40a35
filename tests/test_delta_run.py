"""Running with task deltas: against models whose weights have the delta in them."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint
from hand_plan import hand_plan
from safetensors.torch import load_file, save_file
from test_delta_file import rewritten, values_of
from test_packed_tensors import make_fp8
from tuned_models import noise, tuned_copy

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.converters.build import build
from edge_moe.converters.delta_writer import Scaling
from edge_moe.converters.make_delta import make_delta
from edge_moe.converters.sparsify import sparsify
from edge_moe.delta_file import DeltaFile
from edge_moe.errors import BudgetError, DeltaError, InputError
from edge_moe.formats import DROP, get_form, pack_expert, unpack_expert
from edge_moe.runtime.delta_store import DeltaStore, open_delta
from edge_moe.runtime.expert_store import CheckpointStore
from edge_moe.runtime.kernel_choice import Kernels
from edge_moe.runtime.session import Session
from edge_moe.runtime.stalls import StallOptions
from edge_moe.sparse_signs import PACKING_BYTES

PROMPT = list(range(5, 45))
Logits = np.ndarray[Any, np.dtype[np.float32]]


def logits(folder: Path, **options: Any) -> Logits:
    with Session.open(folder, context_tokens=64, **options) as session:
        found = session.logits(PROMPT)
        session.check_integrity()
        return found


def merged(base: Path, delta: DeltaFile, output: Path, form: str = "bf16") -> Path:
    """The base as a float32 checkpoint with the delta added; experts rounded to `form` after."""
    shutil.copytree(base, output)
    checkpoint = Checkpoint(base)
    spec = checkpoint.spec
    tensors = {name: value.float() for name, value in load_file(base / "model.safetensors").items()}
    for name, tensor in delta.dense():
        tensors[name] += torch.from_numpy(values_of(delta, tensor))
    for layer_id in spec.moe_layer_ids:
        for expert_id in range(spec.num_experts):
            matrices = [
                weights + values_of(delta, tensor)
                for weights, tensor in zip(
                    checkpoint.expert(layer_id, expert_id),
                    delta.expert(layer_id, expert_id),
                    strict=True,
                )
            ]
            for name, matrix in zip(
                spec.expert_tensor_names(layer_id, expert_id), matrices, strict=True
            ):
                rounded = get_form(form).unpack(get_form(form).pack(matrix), matrix.shape[1])
                tensors[name] = torch.from_numpy(rounded)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_paged_and_patched_is_the_merged_model(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Few slots or all: the logits of the model with the delta in its weights, bit for bit."""
    folder, path = tiny_checkpoint(family), tmp_path / "it.delta"
    make_delta(folder, tuned_copy(folder, tmp_path / "tuned", noise), path, density=0.1)
    wanted = logits(merged(folder, DeltaFile(path), tmp_path / "merged"))
    assert np.abs(wanted - logits(folder)).max() > 0.01
    for slots in (None, Checkpoint(folder).spec.top_k + 1):
        np.testing.assert_array_equal(logits(folder, delta=path, num_slots=slots), wanted)


def test_signs_of_one_size_are_the_tuned_model_bit_for_bit(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """tau = +-1/8 everywhere on weights that are multiples of it: a delta of density 1 is exact."""
    folder = tiny_checkpoint("qwen3_moe")

    def coarse(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (value * 8).round() / 8 - value

    def signs(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(0, 2, value.shape, generator=generator) / 4 - 0.125

    base = tuned_copy(folder, tmp_path / "base", coarse)
    tuned = tuned_copy(base, tmp_path / "tuned", signs)
    report = make_delta(base, tuned, tmp_path / "it.delta", density=1.0)
    assert report.explained == 1.0 and report.num_kept == report.num_weights
    assert report.bits_per_weight < 1.11  # one per sign, and the tables
    np.testing.assert_array_equal(logits(base, delta=tmp_path / "it.delta"), logits(tuned))


def test_pruned_package_takes_the_rows_and_experts_that_it_keeps(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder, path = tiny_checkpoint("deepseek_v3"), tmp_path / "it.delta"  # with a selection bias
    make_delta(folder, tuned_copy(folder, tmp_path / "tuned", noise), path, density=0.2)
    other = merged(folder, DeltaFile(path), tmp_path / "merged")
    spec = Checkpoint(folder).spec
    row = [DROP if expert in (1, 6) else "bf16" for expert in range(spec.num_experts)]
    forms = [row for _ in spec.moe_layer_ids]
    package = build(hand_plan(Checkpoint(folder), forms), tmp_path / "out")
    plan = hand_plan(Checkpoint(other), forms)
    wanted = logits(build(plan, tmp_path / "wanted"))
    np.testing.assert_allclose(logits(package, delta=path), wanted, atol=1e-5)
    np.testing.assert_array_equal(
        logits(package, delta=path), logits(package, delta=path, num_slots=3)
    )


@pytest.mark.parametrize("kernels", ["exact", "ggml"])
def test_quantised_experts_keep_their_bytes_and_get_the_product_beside(
    kernels: Kernels, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Against float32 experts that are what the packed ones unpack to, plus the delta.

    libggml rounds inputs of its own products to 8 bits: it is compared with itself, on a package
    that differs from this one in the delta alone.
    """
    folder, path = tiny_checkpoint("qwen3_moe", wide=True), tmp_path / "it.delta"
    tuned = tuned_copy(folder, tmp_path / "tuned", noise)
    make_delta(folder, tuned, path, density=0.05, scaling=Scaling("least-squares"))
    row = ["q4_k", "q8_0", "q2_k", "bf16", "q4_k", "tq1_0", "q4_0", DROP]
    package = build(hand_plan(Checkpoint(folder), [row, row]), tmp_path / "out")
    found = logits(package, delta=path, kernels=kernels)
    paged = logits(package, delta=path, kernels=kernels, num_slots=7)
    np.testing.assert_array_equal(found, paged)
    wanted = logits(beside(folder, DeltaFile(path), row, tmp_path / "wanted"), kernels="exact")
    change = np.abs(wanted - logits(package, kernels="exact")).max()
    error = np.abs(found - wanted).max()
    assert error < (2e-5 if kernels == "exact" else 0.2 * change), (error, change)


def beside(base: Path, delta: DeltaFile, row: list[str], output: Path) -> Path:
    """A package of float32 experts: what `row` packs and unpacks, plus the delta."""
    checkpoint = Checkpoint(base)
    spec = checkpoint.spec
    copy = merged(base, delta, output.with_name("changed"))
    tensors = load_file(copy / "model.safetensors")
    for layer_id in spec.moe_layer_ids:
        for expert_id, form in enumerate(row):
            if form == DROP:
                continue
            packed = pack_expert(form, *checkpoint.expert(layer_id, expert_id))
            matrices = unpack_expert(form, packed, *spec.expert_shape)
            names = spec.expert_tensor_names(layer_id, expert_id)
            signs = delta.expert(layer_id, expert_id)
            for name, matrix, tensor in zip(names, matrices, signs, strict=True):
                changed = matrix + values_of(delta, tensor)
                if form == "bf16":
                    changed = get_form(form).unpack(get_form(form).pack(changed), matrix.shape[1])
                tensors[name] = torch.from_numpy(changed)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    kept = [form if form == DROP else "f32" for form in row]
    return build(hand_plan(Checkpoint(copy), [kept] * 2), output)


def test_decoding_one_by_one_is_the_prompt(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """A token's experts in one group, and a prompt's: the same products."""
    folder, path = tiny_checkpoint("qwen3_moe", wide=True), tmp_path / "it.delta"
    tuned = tuned_copy(folder, tmp_path / "tuned", noise)
    make_delta(folder, tuned, path, density=0.05, scaling=Scaling("least-squares"))
    package = build(hand_plan(Checkpoint(folder), [["q8_0"] * 8] * 2), tmp_path / "out")
    for kernels in ("exact", "ggml"):
        with Session.open(package, delta=path, kernels=kernels, num_slots=3) as session:
            vocab_size = session.model.config.vocab_size
            one = session.new_loop().logits(PROMPT, vocab_size, chunk_tokens=1)
            apart = np.abs(one - session.logits(PROMPT))
            assert np.median(apart) < 2e-4
            # ggml rounds inputs, where the last digit of a sum may tip a value over
            assert apart.max() < (2e-4 if kernels == "exact" else 0.05)


def test_memory_and_reads_are_counted(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder, path = tiny_checkpoint("qwen3_moe", wide=True), tmp_path / "it.delta"
    make_delta(folder, tuned_copy(folder, tmp_path / "tuned", noise), path, density=0.05)
    package = build(hand_plan(Checkpoint(folder), [["q4_k"] * 8] * 2), tmp_path / "out")
    with Session.open(package, num_slots=4, prefetch=False) as session:
        before = session.measured_terms["experts"]
        list(session.generate_ids(PROMPT, 8))
        read = session.statistics().page_in_bytes / session.statistics().misses
    with Session.open(package, delta=path, num_slots=4, prefetch=False) as session:
        tail = session._setup.store.tail
        assert tail is not None
        weights, width = session.spec.expert_weights, session.spec.expert_width
        signs, starts = round(0.05 * weights), 3 * width + 2
        assert 2 * signs < tail.num_bytes - 4 * starts < 2 * signs + 80
        assert session.measured_terms["experts"] == before + 4 * tail.num_bytes
        terms = {term.name: term.num_bytes for term in session.memory()}
        assert terms["experts"] == session.measured_terms["experts"]
        assert terms["task delta"] > 0
        list(session.generate_ids(PROMPT, 8))
        statistics = session.statistics()
        packed = statistics.page_in_bytes / statistics.misses - read
        assert packed == pytest.approx(0.34 * weights / 8, rel=0.05)
    with pytest.raises(BudgetError, match="task delta") as caught:
        Session.open(package, delta=path, budget_bytes=10_000_000, context_tokens=64)
    minimum = caught.value.minimum_bytes
    with Session.open(package, delta=path, budget_bytes=minimum, context_tokens=64) as session:
        assert session.is_paging and session.generate_ids(PROMPT, 4)


def test_delta_of_another_model(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder, path = tiny_checkpoint("qwen3_moe"), tmp_path / "it.delta"
    make_delta(folder, tuned_copy(folder, tmp_path / "tuned", noise), path)
    with pytest.raises(DeltaError, match=r"not for this model.*edge-moe delta"):
        Session.open(tiny_checkpoint("olmoe"), delta=path)
    with pytest.raises(DeltaError, match="not for this model"):
        Session.open(tmp_path / "tuned", delta=path)
    with pytest.raises(InputError, match="shadows, which --delta does not change"):
        Session.open(folder, delta=path, stall=StallOptions("never"))


def test_damaged_expert_is_named(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder, path = tiny_checkpoint("qwen3_moe"), tmp_path / "it.delta"
    make_delta(folder, tuned_copy(folder, tmp_path / "tuned", noise), path)
    tensor = DeltaFile(path).expert(1, 3)[2]
    with path.open("r+b") as handle:
        handle.seek(tensor.offset + 5)
        byte = handle.read(1)
        handle.seek(tensor.offset + 5)
        handle.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DeltaError, match=r"layer 1 expert 3 is damaged \(its checksum differs\)"):
        Session.open(folder, delta=path)


@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens.forward", "model.training"])
def test_names_of_what_is_no_tensor_are_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, name: str
) -> None:
    folder, path = tiny_checkpoint("qwen3_moe"), tmp_path / "it.delta"
    make_delta(folder, tuned_copy(folder, tmp_path / "tuned", noise), path)
    dense = [each.model_dump(mode="json") for each in DeltaFile(path).info.dense]
    dense[0]["name"] = name
    rewritten(path.read_bytes(), path, dense=dense)
    with pytest.raises(DeltaError, match=f"no tensor '{name}'"):
        Session.open(folder, delta=path)


def test_sums_beyond_float16_are_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder, path = tiny_checkpoint("qwen3_moe"), tmp_path / "it.delta"

    def huge(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.full_like(value, 1e5)

    make_delta(folder, tuned_copy(folder, tmp_path / "tuned", huge), path, density=1.0)
    plan = hand_plan(Checkpoint(folder), [["f16"] * 8] * 2)
    with pytest.raises(DeltaError, match="layer 0 expert 0: form f16 cannot hold a weight"):
        Session.open(build(plan, tmp_path / "out"), delta=path)


def test_unpacking_keeps_to_its_bill(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_moe", wide=True)
    tuned = tuned_copy(folder, tmp_path / "tuned", noise)
    for density in (0.05, 0.5, 0.9):
        path = tmp_path / f"{density}.delta"
        make_delta(folder, tuned, path, density=density)
        checkpoint = Checkpoint(folder)
        delta = open_delta(path, checkpoint.fingerprint, checkpoint.spec)
        store = DeltaStore(CheckpointStore(checkpoint), delta, checkpoint.spec)
        buffer = memoryview(bytearray(store.record((0, 0)).num_bytes))
        store.read_into((0, 0), buffer)
        tracemalloc.start()
        store.read_into((0, 0), buffer)  # verified by now
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        store.close()
        assert peak < (store.term().num_bytes - delta.table_bytes) / 2, density


def test_commands(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """delta, run and eval; and programs that have nothing for a delta."""
    folder, path = tiny_checkpoint("qwen3_moe"), tmp_path / "it.delta"
    tuned = tuned_copy(folder, tmp_path / "tuned", noise)
    assert run(["delta", str(folder), str(tuned), "-o", str(path), "--density", "0.2"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "times smaller than the model" in said and "bits per weight" in said
    assert "scales: l1;" in said
    task = tmp_path / "task.txt"
    task.write_text("one two three four five six seven " * 40)
    chosen = ["delta", str(folder), str(tuned), "-o", str(tmp_path / "chosen.delta")]
    assert run([*chosen, "--task", str(task), "--alpha", "2"]) == 2
    assert run([*chosen, "--scale", "l1", "--alpha", "2"]) == 2
    assert run([*chosen, "--budget", "1GB"]) == 2
    assert run([*chosen, "--task", str(task)]) == 0
    assert "scales" in capsys.readouterr().err
    arguments = ["--task", str(task), "--window-tokens", "32", "--max-windows", "4", "--json"]
    results = []
    for options in ([], ["--delta", str(path)]):
        assert run(["eval", str(folder), *arguments, *options]) == 0
        results += json.loads(capsys.readouterr().out)
    assert [result["delta"] for result in results] == [None, str(path)]
    assert results[0]["perplexity"] != results[1]["perplexity"]
    answers = []
    for options in ([], ["--delta", str(path), "--slots", "3"]):
        prompt = ["--prompt", "one two", "--raw", "--max-new-tokens", "8", "--json"]
        assert run(["run", str(folder), *prompt, *options]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert "task delta" in {term["name"] for term in answers[1]["terms"]}
    assert answers[0]["text"] != answers[1]["text"]
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for command in (["run", "--prompt", "a"], ["eval", "--task", str(task)]):
        arguments = [command[0], str(tmp_path / "model.gguf"), *command[1:], "--delta", str(path)]
        assert run(arguments) == 2
        assert "llama.cpp, which has nothing for --delta" in capsys.readouterr().err


def test_misses_computed_where_they_lie_have_the_delta(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Experts in RAM beside the slots are packed in the same way, tail and all."""
    folder, path = tiny_checkpoint("qwen3_moe", wide=True), tmp_path / "it.delta"
    make_delta(folder, tuned_copy(folder, tmp_path / "tuned", noise), path, density=0.05)
    package = build(hand_plan(Checkpoint(folder), [["q8_0"] * 8] * 2), tmp_path / "out")
    with Session.open(package, delta=path, kernels="ggml") as session:
        wanted = session.generate_ids(PROMPT, 12, stop_at_eos=False)
    with Session.open(
        package, delta=path, kernels="ggml", num_slots=4, ram_bytes=10**7, misses="cpu"
    ) as session:
        assert session.generate_ids(PROMPT, 12, stop_at_eos=False) == wanted
        assert session.statistics().cpu_experts > 0


def test_base_in_fp8_and_a_tuned_model_in_bf16(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Packed weights of the base count as what they stand for, dense ones and experts."""
    folder, path = tiny_checkpoint("qwen3_moe"), tmp_path / "it.delta"
    base = make_fp8(folder, tmp_path / "fp8")
    tuned = tuned_copy(folder, tmp_path / "tuned", noise)
    make_delta(base, tuned, path, density=1.0, scaling=Scaling("least-squares"))
    delta, packed, whole = DeltaFile(path), Checkpoint(base), Checkpoint(tuned)
    for name, tensor in delta.dense():
        tau = whole.read(name) - packed.read(name)
        np.testing.assert_array_equal(np.sign(values_of(delta, tensor)), np.sign(tau))
    for tensor, first, second in zip(
        delta.expert(1, 3), packed.expert(1, 3), whole.expert(1, 3), strict=True
    ):
        np.testing.assert_array_equal(np.sign(values_of(delta, tensor)), np.sign(second - first))
    found = logits(base, delta=path)
    assert np.abs(found - logits(base)).max() > 0.01
    np.testing.assert_array_equal(found, logits(base, delta=path, num_slots=3))


def test_sparsifying_takes_the_memory_that_is_said() -> None:
    generator = np.random.default_rng(0)
    for density in (0.05, 0.5):
        tau = generator.standard_normal(2**18, np.float32)
        tracemalloc.start()
        sparsify(lambda tau=tau: iter([tau]), density, lambda data: None)  # type: ignore[misc]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        histogram_bytes = 2 * 8 * 2**16 * 2
        assert peak < PACKING_BYTES * len(tau) + histogram_bytes
