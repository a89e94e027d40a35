"""A dense model is split into experts that are parts of it: together they are what it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file
from tiny_models import make_tiny_dense
from torch import Tensor
from transformers import AutoModelForCausalLM

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.converters.recover_teacher import cache_bytes
from edge_moe.converters.recover_text import TrainText
from edge_moe.converters.upcycle import learn, split
from edge_moe.converters.upcycle.dense_model import open_dense
from edge_moe.converters.upcycle.split import _fingerprint, _Job, split_dense
from edge_moe.converters.upcycle.split_layer import SplitLayer, choose, split_layer
from edge_moe.converters.upcycle.split_layers import split_block
from edge_moe.converters.upcycle.split_neurons import DenseFfn, NeuronSplit
from edge_moe.converters.upcycle.split_record import RECORD_NAME, SplitSettings
from edge_moe.converters.upcycle.split_router import (
    NormalEquations,
    bounded_rows,
    router_rows,
    score_reach,
    tilt_bound,
)
from edge_moe.converters.upcycle.split_shape import split_shape
from edge_moe.converters.upcycle.split_student import DistilSettings, SplitStudent
from edge_moe.converters.upcycle.stored_tensor import from_values
from edge_moe.converters.upcycle.target import Glm4MoeTarget, Qwen2MoeTarget, choose_target
from edge_moe.converters.window_training import WindowTraining
from edge_moe.errors import CheckpointError, InputError
from edge_moe.runtime.session import Session
from smollm2.layer import running

IDS = [(7 * i * i + 3 * i) % 250 + 1 for i in range(40)]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied float32": ("llama", {"tie_word_embeddings": True, "dtype": "float32"}),
    "mistral float16": ("mistral", {"sliding_window": None, "dtype": "float16"}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("\n".join(f"line {n} of a text, {n * n}" for n in range(200)))
    return path


def logits(folder: Path, top_k: int | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    options = {} if top_k is None else {"num_experts_per_tok": top_k}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.inference_mode():
        found: np.ndarray[Any, np.dtype[np.float32]] = (
            model.eval()(torch.tensor([IDS])).logits[0].numpy()
        )
    return found


def split_tiny(dense: Path, text: Path, output: Path, **options: Any) -> Any:
    shape = {"num_experts": 4, "top_k": 2, "window_tokens": 64, "max_windows": 6}
    return split_dense(dense, [str(text)], output, **shape | options)


@pytest.mark.parametrize("case", CASES)
def test_all_experts_together_are_the_dense_model(case: str, text: Path, tmp_path: Path) -> None:
    model_type, config = CASES[case]
    dense = make_tiny_dense(tmp_path / "dense", model_type, **config)
    expected = logits(dense)
    exact = SplitSettings(max_tilt=1e-6)
    record = split_tiny(dense, text, tmp_path / "exact", settings=exact)
    np.testing.assert_allclose(logits(tmp_path / "exact", 4), expected, atol=2e-6 * 10, rtol=0)
    assert all(0 < layer.tilt_bound <= 1e-6 for layer in record.layers)
    # and with the default tilt, which orders experts better, within about a thousandth
    record = split_tiny(dense, text, tmp_path / "moe")
    assert all(5e-4 < layer.tilt_bound <= 1e-3 for layer in record.layers)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(tmp_path / "moe", 4), expected, atol=2e-3 * scale, rtol=0)
    # with fewer it is something else, the same in our own runtime as in transformers
    some = logits(tmp_path / "moe")
    assert np.abs(some - expected).max() > 0.01
    with Session.open(tmp_path / "moe", num_slots=3) as session:
        np.testing.assert_allclose(session.logits(IDS), some, atol=3e-5)


@pytest.mark.parametrize("name", ["mlp.down_proj", "post_attention_layernorm"])
def test_a_layer_that_adds_nothing(name: str, text: Path, tmp_path: Path) -> None:
    """Pruned layers are such: nothing tells the experts apart, and their router is 0."""
    dense = make_tiny_dense(tmp_path / "dense", "llama")
    tensors = load_torch_file(dense / "model.safetensors")
    tensors[f"model.layers.1.{name}.weight"].zero_()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    record = split_tiny(dense, text, tmp_path / "moe", settings=SplitSettings(max_tilt=1e-6))
    assert record.layers[0].tilt_bound > 0 == record.layers[1].tilt_bound
    assert not Checkpoint(tmp_path / "moe").read("model.layers.1.mlp.gate.weight").any()
    np.testing.assert_allclose(logits(tmp_path / "moe", 4), logits(dense), atol=2e-5, rtol=0)


def test_inputs_that_fix_no_router_have_one() -> None:
    """Two coordinates that are always alike share what one would get; a dead one gets nothing."""
    equations = NormalEquations.zeros(3, 1)
    equations.add(torch.tensor([[1.0, 1, 0], [2, 2, 0]]), torch.tensor([[4.0], [8]]))
    torch.testing.assert_close(equations.solve(0.0), torch.tensor([[2.0, 2, 0]]))
    assert router_rows(NormalEquations.zeros(2, 4), 0.01, 1.0).tolist() == [[0, 0]] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_sums_that_are_not_finite_are_no_router_of_zeros(value: float) -> None:
    equations = NormalEquations.zeros(2, 2)
    equations.add(torch.tensor([[1.0, value]]), torch.tensor([[1.0, 2]]))
    with pytest.raises(CheckpointError, match="no finite strengths.*download it again"):
        router_rows(equations, 0.01, 1.0)


def test_scores_by_hand() -> None:
    rows, norm = torch.tensor([[3.0, 0], [0, 2], [0, 0]]), torch.tensor([1.0, 2])
    # times the norm: (3, 0), (0, 4), (0, 0); the first two are 5 apart
    assert score_reach(rows, norm, is_softmax=True) == pytest.approx(5 * math.sqrt(2))
    assert score_reach(rows, norm, is_softmax=False) == pytest.approx(4 * math.sqrt(2))
    assert tilt_bound(rows, norm, is_softmax=True) == pytest.approx(math.exp(5 * 2**0.5) - 1)
    assert tilt_bound(rows, norm, is_softmax=False) == pytest.approx(math.tanh(2 * 2**0.5))
    for is_softmax in (True, False):
        found = bounded_rows(rows, norm, 1e-3, is_softmax=is_softmax)
        assert 0.98e-3 < tilt_bound(found, norm, is_softmax=is_softmax) <= 1e-3
        assert torch.equal(found, found.bfloat16().float())
        zeros = torch.zeros(3, 2)
        assert torch.equal(bounded_rows(zeros, norm, 1e-3, is_softmax=is_softmax), zeros)


@pytest.mark.parametrize("is_softmax", [True, False])
def test_no_input_tilts_further_than_the_bound(is_softmax: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = torch.rand(8, generator=generator) + 0.5
    rows = torch.randn(4, 8, generator=generator) * 0.05
    bound = tilt_bound(rows, norm, is_softmax=is_softmax)
    if is_softmax:
        rows_apart = (rows[:, None] - rows[None]).flatten(0, 1) * norm
        worst = rows_apart[rows_apart.norm(dim=1).argmax()]
    else:
        worst = (rows * norm)[(rows * norm).norm(dim=1).argmax()]
    others = torch.randn(200, 8, generator=generator)
    states = torch.cat([worst[None], -worst[None], others])
    inputs = states / states.square().mean(dim=1, keepdim=True).sqrt() * norm
    scores = inputs @ rows.T
    weights = 4 * scores.softmax(dim=1) if is_softmax else 2 * scores.sigmoid()
    tilts = (weights - 1).abs().amax(dim=1)
    assert tilts.max() <= bound * (1 + 1e-6) + 1e-7
    if not is_softmax:
        assert tilts[0] == pytest.approx(bound, rel=1e-4)  # and one reaches it


def test_chosen_experts_are_the_masked_dense_network() -> None:
    """Every expert holds its neurons, and down_proj makes up for its weight."""
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(10, 6, generator=generator) for _ in range(2))
    ffn = DenseFfn(gate, up, torch.randn(6, 10, generator=generator))
    split = NeuronSplit(torch.tensor([4, 9]), torch.tensor([[0, 7], [1, 3], [2, 8], [5, 6]]))
    layer = SplitLayer(split, torch.randn(4, 6, generator=generator), recall=1.0)
    arrays = tuple(each.numpy() for each in (gate, up, ffn.down))
    stored = tuple(from_values("", "F32", array) for array in arrays)
    block = split_block(lambda: arrays, stored, layer, 4.0)  # type: ignore[arg-type, return-value]
    inputs = torch.randn(5, 6, generator=generator)

    def output(matrices: Any) -> Tensor:
        return DenseFfn(*(torch.from_numpy(matrix.read()) for matrix in matrices)).output(inputs)

    chosen = choose(layer.router, inputs, 2)
    parts = torch.stack([output(expert) / 4 for expert in block.experts], dim=1)
    found = output(block.shared) + parts.gather(1, chosen[:, :, None].expand(-1, -1, 6)).sum(dim=1)
    expected = (ffn.activations(inputs) * running(split, chosen)) @ ffn.down.T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output(block.shared) + parts.sum(dim=1), ffn.output(inputs))


def test_experts_are_stored_as_their_own_neurons_are(text: Path, tmp_path: Path) -> None:
    """GGUF files keep embeddings in F16 beside packed layers, whose values only F32 holds."""
    dense = make_tiny_dense(tmp_path / "dense", "llama", dtype="float32")
    tensors = load_torch_file(dense / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].half()
    up = "model.layers.1.mlp.up_proj.weight"
    tensors[up] = tensors[up].bfloat16()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    learn = DistilSettings(steps=1, batch_windows=1)
    split_tiny(dense, text, tmp_path / "moe", settings=SplitSettings(max_tilt=1e-6))
    split_tiny(dense, text, tmp_path / "learned", distil=learn)
    for folder in (tmp_path / "moe", tmp_path / "learned"):
        found = load_torch_file(folder / "model.safetensors")
        matrices = {name: values.dtype for name, values in found.items() if "_proj" in name}
        is_16_bit = {name for name, dtype in matrices.items() if dtype == torch.bfloat16}
        assert is_16_bit == {name for name in matrices if "layers.1.mlp" in name and "up" in name}
        assert set(matrices.values()) == {torch.float32, torch.bfloat16}
        assert Checkpoint(folder).spec.dtype == "float32"
    np.testing.assert_allclose(logits(tmp_path / "moe", 4), logits(dense), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("steps", "copies"), [(0, 1), (2, 2)])
def test_room_for_all_that_is_written_is_asked_for_first(
    steps: int, copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bool]] = []
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n".join(f"{i} and {i + 1} make {2 * i + 1}" for i in range(300)))

    def ask(folder: Path, needed_bytes: int, purpose: str) -> None:
        asked.append((needed_bytes, any(folder.glob("split_*"))))

    monkeypatch.setattr(split, "require_free_disk", ask)
    dense = make_tiny_dense(tmp_path / "dense", "llama")
    record = split_dense(
        dense,
        [str(text)],
        out,
        num_experts=4,
        top_k=2,
        window_tokens=64,
        max_windows=8,
        distil=DistilSettings(steps=steps),
    )
    sidecar, allowance = open_dense(dense).sidecar_bytes, 2**20
    assert asked == [(copies * (record.total_bytes + sidecar + allowance), False)]


def test_a_killed_split_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_tiny_dense(tmp_path / "dense", "llama", num_hidden_layers=3)
    split_tiny(dense, text, tmp_path / "whole")
    calls: list[int] = []

    def dying(*arguments: Any, **options: Any) -> SplitLayer:
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return split_layer(*arguments, **options)

    monkeypatch.setattr("edge_moe.converters.upcycle.split.split_layer", dying)
    with pytest.raises(KeyboardInterrupt):
        split_tiny(dense, text, tmp_path / "out")
    split_tiny(dense, text, tmp_path / "out")
    assert len(calls) == 2 + 2  # the first layer was not split again
    for path in (tmp_path / "whole").iterdir():
        if path.name not in (RECORD_NAME, "README.md"):  # which has the folder's name
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    record = json.loads((tmp_path / "out" / RECORD_NAME).read_text())
    assert [0 < layer["recall"] <= 1 for layer in record["layers"]] == [True] * 3
    spec = Checkpoint(tmp_path / "out").spec
    assert (spec.num_experts, spec.top_k, spec.expert_width) == (4, 2, record["expert_width"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 6}, "use 4, 8, 16"),
        ({"num_experts": 1, "top_k": 1}, "at least 2"),
        ({"top_k": 5}, "use 1 to 4"),
        ({"expert_width": 16}, "leave none of 64 always on"),
        ({"expert_width": 0}, "leave none of 64 always on"),
        ({"window_tokens": 10_000}, "--seq is 10000: use 2 to 512, the model's context"),
    ],
)
def test_shapes_that_cannot_be(
    options: dict[str, Any], message: str, text: Path, tmp_path: Path
) -> None:
    dense = make_tiny_dense(tmp_path / "dense", "llama")
    with pytest.raises(InputError, match=message):
        split_tiny(dense, text, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_widths(tmp_path: Path) -> None:
    llama = open_dense(make_tiny_dense(tmp_path / "a", "llama", intermediate_size=1536)).config
    assert isinstance(choose_target(llama), Qwen2MoeTarget)
    found = split_shape(llama, Qwen2MoeTarget(), 16, 4, None)
    assert (found.expert_width, found.shared_width) == (64, 512)
    found = split_shape(llama, Qwen2MoeTarget(), 4, 1, None)
    assert (found.expert_width, found.shared_width) == (256, 512)
    qwen = open_dense(make_tiny_dense(tmp_path / "b", "qwen3", intermediate_size=96)).config
    found = split_shape(qwen, Glm4MoeTarget(), 8, 2, None)
    assert found.shared_width % found.expert_width == 0 and found.shared_width >= 24
    with pytest.raises(InputError, match="as a multiple of the experts', 9"):
        split_shape(qwen, Glm4MoeTarget(), 8, 2, 9)


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_distillation(case: str, text: Path, tmp_path: Path) -> None:
    """It comes nearer to the dense model, and what is stored is what was judged."""
    model_type, config = CASES[case]
    dense = make_tiny_dense(tmp_path / "dense", model_type, dtype="float32", **config)
    learn = DistilSettings(steps=40, batch_windows=1, learning_rate=3e-3, num_judgements=2)
    record = split_tiny(dense, text, tmp_path / "moe", distil=learn)
    first, kept = record.losses[0], min(record.losses, key=lambda row: row.heldout_loss)
    assert kept.step == record.kept_step > 0
    assert kept.heldout_divergence < 0.95 * first.heldout_divergence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
    # routers alone leave every other weight as it was
    alone = learn.model_copy(update={"trains": "routers", "steps": 6})
    split_tiny(dense, text, tmp_path / "routers", distil=alone)
    split_tiny(dense, text, tmp_path / "plain")
    changed = {
        name
        for name, values in load_file(tmp_path / "plain" / "model.safetensors").items()
        if not np.array_equal(values, load_file(tmp_path / "routers" / "model.safetensors")[name])
    }
    assert all(name.endswith("mlp.gate.weight") for name in changed)


def test_the_student_starts_as_the_dense_model(text: Path, tmp_path: Path) -> None:
    dense = make_tiny_dense(tmp_path / "dense", "llama", dtype="float32")
    split_tiny(dense, text, tmp_path / "moe", settings=SplitSettings(max_tilt=1e-6))
    student = SplitStudent(tmp_path / "moe", "all")
    np.testing.assert_allclose(student.logits(IDS), logits(dense), atol=2e-5)
    with torch.no_grad():
        np.testing.assert_allclose(student.run(IDS)[0].numpy(), logits(tmp_path / "moe"), atol=1e-5)
    student.begin()  # routers are the trained ones times a factor
    with torch.no_grad():
        np.testing.assert_allclose(student.run(IDS)[0].numpy(), logits(tmp_path / "moe"), atol=1e-4)
    assert {name.split(".")[-1] for name in student.parameters if "model" not in name} == {"router"}


def test_command_line(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = make_tiny_dense(tmp_path / "dense", "llama")
    asked = ["upcycle", str(dense), "--split", "--data", str(text), "--top-k", "2", "--seq", "64"]
    assert run([*asked, "-o", str(tmp_path / "moe"), "--expert-width", "12"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "16 neurons always on, 4 experts of 12: a token uses 62% of" in said
    record = json.loads((tmp_path / "moe" / RECORD_NAME).read_text())
    assert record["losses"] == [] and record["expert_width"] == 12
    learning = ["--steps", "2", "--batch", "1", "--max-windows", "6", "--train", "routers"]
    assert run([*asked, "-o", str(tmp_path / "learned"), *learning]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "nats per token, kept step" in said and "Loading" not in said
    for options, message in [
        (["--ternary", "--lm-weight", "0.5"], "leave out --ternary, --lm-weight"),
        (["--train", "routed"], "leave out --train routed"),
        (["--experts", "6"], "use 4, 8, 16"),
        (["--lr", "0.1", "--train", "routers"], "leave out --train, --lr, or add --steps"),
        (["--steps", "0", "--batch", "2"], "leave out --batch, or add --steps"),
    ]:
        assert run([*asked, "-o", str(tmp_path / "bad"), *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert run([*asked[:3], "-o", str(tmp_path / "bad")]) == 2
    assert "give --data" in " ".join(capsys.readouterr().err.split())
    assert run(["upcycle", str(dense), "-o", str(tmp_path / "bad"), "--expert-width", "8"]) == 2
    assert "are for --split" in " ".join(capsys.readouterr().err.split())


def test_a_killed_distillation_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_tiny_dense(tmp_path / "dense", "llama")
    learn = DistilSettings(steps=4, batch_windows=1, num_judgements=2)
    split_tiny(dense, text, tmp_path / "whole", distil=learn)
    take_step = WindowTraining._take_step

    def dying(training: WindowTraining) -> None:
        if training.step == 2:  # the state of step 2 is on disk, it was judged
            raise KeyboardInterrupt
        take_step(training)

    with monkeypatch.context() as patched:
        patched.setattr(WindowTraining, "_take_step", dying)
        patched.setattr("edge_moe.converters.upcycle.learn._SAVE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            split_tiny(dense, text, tmp_path / "out", distil=learn)
    split_tiny(dense, text, tmp_path / "out", distil=learn)
    names = [path.name for path in (tmp_path / "whole").glob("*.safetensors")]
    assert names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_card_carries_the_licence(text: Path, tmp_path: Path) -> None:
    dense = make_tiny_dense(tmp_path / "dense", "llama")
    (dense / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# dense\n")
    record = split_tiny(dense, text, tmp_path / "moe", name="owner/dense")
    card = (tmp_path / "moe/README.md").read_text()
    assert card.startswith('---\nbase_model: "owner/dense"\nlicense: mit\nlanguage: en\n')
    assert "# moe\n\nQwen2MoeForCausalLM split from the dense model owner/dense with" in card
    assert record.source == "owner/dense"
    assert split_tiny(dense, text, tmp_path / "again").source == "dense"


def test_disk_is_asked_for_the_state_too(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions, two states (a new one is written beside the last), and the output."""
    stored, asked = [0], [0]
    save = WindowTraining._save

    def saving(training: WindowTraining) -> None:
        save(training)
        stored.append(training._state_path.stat().st_size)

    monkeypatch.setattr(WindowTraining, "_save", saving)
    monkeypatch.setattr(learn, "require_free_disk", lambda _, size, __: asked.append(size))
    dense = make_tiny_dense(tmp_path / "dense", "llama")
    distil = DistilSettings(steps=1, batch_windows=1)
    split_tiny(dense, text, tmp_path / "moe", distil=distil)
    num_predicted_tokens = 2 * 64  # of a window that is learned from and one that judges
    record = json.loads((tmp_path / "moe" / RECORD_NAME).read_bytes())
    output = record["total_bytes"] + open_dense(dense).sidecar_bytes + 2**20
    states = asked[-1] - cache_bytes(num_predicted_tokens) - output
    assert 0.95 * 2 * stored[-1] < states < 2 * stored[-1]


def test_state_belongs_to_the_text_that_is_learned_from(tmp_path: Path) -> None:
    """The teacher's predictions are kept by the window's number."""
    dense = open_dense(make_tiny_dense(tmp_path, "llama"))
    target = choose_target(dense.config)
    shape = split_shape(dense.config, target, 4, 2, None)

    def fingerprint(*windows: list[int]) -> str:
        text = TrainText(windows, [True] * (len(windows) - 1) + [False])
        distil = DistilSettings(steps=2)
        settings = SplitSettings()
        job = _Job(dense, target, shape, settings, [], distil, text, False, torch.device("cpu"))
        return _fingerprint(job)

    assert fingerprint([1, 2], [3]) == fingerprint([1, 2], [3])
    assert len({fingerprint([1, 2], [3]), fingerprint([1, 4], [3]), fingerprint([1, 2])}) == 3
