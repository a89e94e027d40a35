"""A pre-gate chooses every later layer's experts from what the first is given."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TinyCheckpoint
from hand_plan import hand_plan
from safetensors.numpy import load_file, save_file
from slot_reading import acquire
from test_expert_cache import MemoryStore
from tiny_models import make_tiny_checkpoint
from transformers import AutoModelForCausalLM

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.converters.build import build
from edge_moe.errors import InputError
from edge_moe.families import FAMILIES
from edge_moe.formats import DROP
from edge_moe.runtime.certain_prefetch import CertainPrefetcher
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.fit_pre_gate import PreGateSettings, fit_pre_gate
from edge_moe.runtime.moe_block import MoeBlock
from edge_moe.runtime.policy import LeastRecentlyUsed
from edge_moe.runtime.pre_gate import PreGate, PreGateInfo
from edge_moe.runtime.router_weights import expert_weights, require_weighable
from edge_moe.runtime.session import Session
from edge_moe.runtime.slots import SlotBuffers

RANDOM = torch.Generator().manual_seed(0)
TEXT = [torch.randint(1, 250, (50,), generator=RANDOM).tolist() for _ in range(9)]
PROMPT = list(range(5, 45))
NEW_TOKENS = 16
QUICK = PreGateSettings(width=16, epochs=3, batch_tokens=64)
INFO = PreGateInfo(
    model_fingerprint="m",
    hidden_size=2,
    kept=((0, 1), (3, 5, 7)),
    tasks=("code",),
    num_tokens=9,
    width=2,
    epochs=1,
    agreement=(0.5,),
)
SMALL = PreGate(
    INFO,
    torch.tensor([[1.0, 0], [0, 1]]),
    torch.tensor([0.0, 1]),
    [torch.tensor([[1.0, 0], [0, 1], [-1, -1]])],
    [torch.tensor([0.0, 0, 3])],
)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_are_the_routers_own(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    with Session.open(tiny_checkpoint(family)) as session, torch.inference_mode():
        router = session.spec.router
        if router.score_function == "sparsemixer":
            with pytest.raises(InputError, match="weighs no experts but those it chooses itself"):
                require_weighable(router, family)
            return
        require_weighable(router, family)
        seen: dict[str, torch.Tensor] = {}
        block = session.blocks[1]
        block.on_logits(lambda logits: seen.__setitem__("logits", logits))
        block.router.register_forward_hook(
            lambda *call: seen.update(weights=call[2][1], rows=call[2][2])
        )
        session.logits(list(range(5, 45)))
        found = expert_weights(router, seen["logits"], seen["rows"], block.expert_scale)
        torch.testing.assert_close(found.to(seen["weights"]), seen["weights"])


def random_gate(session: Session, seed: int = 0) -> PreGate:
    """Chooses at random, but always the same for the same input."""
    spec, kept = session.spec, session.kept
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    update = {
        "model_fingerprint": session.fingerprint,
        "hidden_size": spec.hidden_size,
        "kept": tuple(map(tuple, kept)),
        "width": 8,
        "agreement": (0.5,) * (len(kept) - 1),
    }
    sizes = [len(each) for each in kept[1:]]
    return PreGate(
        INFO.model_copy(update=update),
        draw(8, spec.hidden_size),
        draw(8),
        [draw(size, 8) for size in sizes],
        [draw(size) for size in sizes],
    )


def test_choice_by_hand() -> None:
    # silu(2) = 1.7616, silu(0 + 1) = 0.7311: scores 1.7616, 0.7311, 3 - 2.4927 = 0.5073
    hidden = torch.tensor([[2.0, 0], [0, 0]])  # of the second token: 0, 0.7311, 2.2689
    assert [each.tolist() for each in SMALL.choose(hidden, 2)] == [[[0, 1], [2, 1]]]
    fewer = SMALL.for_experts([[0], [7, 3]])
    assert [each.tolist() for each in fewer.choose(hidden, 1)] == [[[1], [0]]]
    with pytest.raises(InputError, match="knows nothing of expert 4 in MoE layer 1"):
        SMALL.for_experts([[0], [3, 4]])
    assert SMALL.num_bytes == SMALL.memory_term.num_bytes == 4 * (4 + 2 + 6 + 3)
    SMALL.require_model("m", 2, 2)
    with pytest.raises(InputError, match="is for 2 MoE layers of width 2, the model has 3"):
        SMALL.require_model("m", 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner.weight": np.zeros((3, 2), np.float32)}, "is damaged: float32"),
        ({"score.1": np.zeros((3, 2), np.float64)}, "is damaged: float64"),
        ({"offset.1": np.full(3, np.nan, np.float32)}, "a value is no number"),
        ({"score.2": np.zeros((3, 2), np.float32)}, "its layers are not complete"),
    ],
)
def test_damaged_files(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "gate.safetensors"
    SMALL.save(path)
    read = PreGate.load(path)
    assert read.info == INFO and torch.equal(read.scores[0], SMALL.scores[0])
    metadata = {"edge_moe_pre_gate": INFO.model_dump_json()}
    save_file(load_file(path) | change, path, metadata=metadata)
    with pytest.raises(InputError, match=message):
        PreGate.load(path)
    for text, words in (("{}", "has version None"), ('{"version": 1}', "header of .* is damaged")):
        save_file({}, path, metadata={"edge_moe_pre_gate": text})
        with pytest.raises(InputError, match=words):
            PreGate.load(path)
    save_file({}, path, metadata={"edge_moe_linear_map": INFO.model_dump_json()})
    with pytest.raises(InputError, match="is no pre-gate"):
        PreGate.load(path)


class Forced:
    """transformers' own model, whose later routers are told which experts to take."""

    def __init__(self, folder: Path, gate: PreGate) -> None:
        self.spec = Checkpoint(folder).spec
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.gate = gate
        self.rows: list[torch.Tensor] = []
        for layer, layer_id in enumerate(self.spec.moe_layer_ids):
            block = MoeBlock(self.model, self.spec, layer_id)
            if layer == 0:
                block.router.register_forward_pre_hook(self._first)
            else:
                block.router.forward = self._forced(block.router.forward, layer)

    def _first(self, module: Any, arguments: tuple[Any, ...]) -> None:
        self.rows = self.gate.choose(arguments[0].flatten(0, -2), self.spec.top_k)

    def _forced(self, forward: Any, layer: int) -> Any:
        """All experts but the forced ones are out of the question, as `masked_routing` has it."""

        def routed(*arguments: Any) -> Any:
            rows = self.rows[layer - 1]

            def linear(values: Any, weight: Any, bias: Any = None) -> Any:
                logits = torch.matmul(values, weight.T)
                chosen = torch.zeros_like(logits, dtype=torch.bool)
                return logits.masked_fill(~chosen.scatter(1, rows, True), -torch.inf)

            with mock.patch("torch.nn.functional.linear", linear):
                return forward(*arguments)

        return routed

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        found: torch.Tensor = self.model(torch.tensor([ids])).logits[0]
        return found

    def greedy(self) -> list[int]:
        ids = list(PROMPT)
        for _ in range(NEW_TOKENS):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(PROMPT) :]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_runs_as_transformers_does_with_the_same_experts(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Families that divide by the sum of the chosen, so that a mask leaves their weights alone."""
    folder = tiny_checkpoint(family)
    if family == "qwen3_moe":
        folder = make_tiny_checkpoint(tmp_path, family, num_hidden_layers=4)
    with Session.open(folder) as session:
        gate, routed = random_gate(session), session.logits(PROMPT)
    forced = Forced(folder, gate)
    expected, wanted = forced.logits(PROMPT), forced.greedy()
    top_k, every = forced.spec.top_k, forced.spec.num_experts * forced.spec.num_moe_layers
    for num_slots in (top_k, top_k + 1, every // 2, every):
        for prefetch in (None, False):
            with Session.open(
                folder, num_slots=num_slots, prefetch=prefetch, pre_gate=gate
            ) as session:
                found = torch.from_numpy(session.logits(PROMPT))
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
                assert (found - torch.from_numpy(routed)).abs().max() > 1e-3
                assert session.generate_ids(PROMPT, NEW_TOKENS, stop_at_eos=False) == wanted
                session.check_integrity()
                read_ahead = session.statistics().prefetch_issued_bytes
                assert not read_ahead or (prefetch is None and num_slots < every)
                assert read_ahead or prefetch is False or num_slots > top_k + 1
                assert session.prefetch_trial is None


def test_choices_not_divided_by_their_sum(tiny_checkpoint: TinyCheckpoint) -> None:
    """qwen2_moe: the softmax over all experts weighs those that the pre-gate chose."""
    with Session.open(tiny_checkpoint("qwen2_moe")) as session:
        gate = random_gate(session)
    with Session.open(tiny_checkpoint("qwen2_moe"), pre_gate=gate) as session:
        assert not session.spec.router.renormalises
        seen: dict[str, torch.Tensor] = {}
        first, second = session.blocks
        first.router.register_forward_pre_hook(lambda _, given: seen.update(first=given[0]))
        second.router.register_forward_pre_hook(lambda _, given: seen.update(second=given[0]))
        with session.tracing() as recorder:
            session.logits(PROMPT)
        trace = recorder.finish(session.trace_info())
        rows = gate.choose(seen["first"].flatten(0, -2), 2)[0]
        assert trace.rows[:, 1].tolist() == rows.tolist()
        shares = (seen["second"].flatten(0, -2) @ second.weight.T).softmax(dim=1).gather(1, rows)
        np.testing.assert_allclose(trace.weights[:, 1], shares.numpy(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_fitted_and_runs(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(family)
    with Session.open(folder) as session:
        if session.spec.router.score_function == "sparsemixer":
            with pytest.raises(InputError, match="weighs no experts but those"):
                fit_pre_gate(session, TEXT, ["text"], QUICK)
            return
        gate = fit_pre_gate(session, TEXT, ["text"], QUICK)
    assert all(0 < share <= 1 for share in gate.info.agreement)
    assert gate.info.num_tokens == 8 * 50 and gate.info.epochs in (1, 2, 3)
    with Session.open(folder, pre_gate=gate) as whole:
        expected = whole.generate_ids(PROMPT, 8, stop_at_eos=False)
        assert "fitted on 400 tokens" in whole.pre_gate
    with Session.open(folder, pre_gate=gate, num_slots=whole.spec.top_k + 1) as paged:
        assert paged.generate_ids(PROMPT, 8, stop_at_eos=False) == expected


def test_it_learns_what_routers_choose(tmp_path: Path) -> None:
    """A text over and over: the second layer's choices follow from the first one's input."""
    folder = make_tiny_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=3)
    settings = PreGateSettings(width=64, epochs=60, batch_tokens=32, learning_rate=1e-2)
    with Session.open(folder) as session:
        gate = fit_pre_gate(session, [TEXT[0]] * 9, ["text"], settings)
        assert min(gate.info.agreement) > 0.9
        again = fit_pre_gate(session, [TEXT[0]] * 9, ["text"], settings)
        assert torch.equal(gate.inner, again.inner)
        routed = session.logits(TEXT[0])
    with Session.open(folder, pre_gate=gate) as session:
        same = session.logits(TEXT[0])
    # nearly always the same experts, and then the same logits
    assert np.median(np.abs(same - routed).max(axis=1)) < 1e-4


def test_what_cannot_be_fitted(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    with Session.open(folder) as session:
        with pytest.raises(InputError, match="one must be learned from"):
            fit_pre_gate(session, TEXT[:1], ["text"], QUICK)
        with pytest.raises(InputError, match="raise --memory from"):
            fit_pre_gate(session, TEXT, ["text"], QUICK, limit_bytes=1000)
        with pytest.raises(InputError, match="--width is 0"):
            fit_pre_gate(session, TEXT, ["text"], PreGateSettings(width=0))
        with pytest.raises(InputError, match="--seed is -1: use 0 to"):
            fit_pre_gate(session, TEXT, ["text"], PreGateSettings(seed=-1))
        with pytest.raises(InputError, match="training diverged"):
            fit_pre_gate(session, TEXT, ["text"], PreGateSettings(learning_rate=1e30))
        gate = random_gate(session)
    with (
        Session.open(folder, pre_gate=gate) as session,
        pytest.raises(InputError, match="open the model without one"),
    ):
        fit_pre_gate(session, TEXT, ["text"], QUICK)
    with pytest.raises(InputError, match="was fitted for another model"):
        Session.open(tiny_checkpoint("olmoe"), pre_gate=gate)


def test_a_package_with_fewer_experts(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """It chooses among those that are left, as the whole model's pre-gate ranks them."""
    folder = tiny_checkpoint("qwen3_moe")
    row = [DROP if expert in (1, 6) else "bf16" for expert in range(8)]
    package = build(hand_plan(Checkpoint(folder), [row, row]), tmp_path / "out")
    with Session.open(folder) as session:
        gate = random_gate(session)
    with Session.open(package, pre_gate=gate, num_slots=5) as session:
        paged = session.logits(PROMPT)
    with Session.open(package, pre_gate=gate.for_experts([[0, 2, 3, 4, 5, 7]] * 2)) as session:
        np.testing.assert_array_equal(session.logits(PROMPT), paged)


def test_command_line(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text, fitted = tiny_checkpoint("qwen3_moe"), tmp_path / "t.txt", tmp_path / "g"
    fitted = fitted.with_suffix(".safetensors")
    text.write_text("\n".join(f"line {n} of a text" for n in range(300)))
    asked = ["fit-pre-gate", str(folder), "--task", str(text), "-o", str(fitted)]
    shape = ["--window-tokens", "40", "--max-windows", "16", "--width", "32", "--epochs", "8"]
    assert run([*asked, *shape]) == 0
    assert "fitted on 560 tokens" in " ".join(capsys.readouterr().err.split())
    scored = ["eval", str(folder), "--task", str(text), "--window-tokens", "40", "--max-windows"]
    scored += ["2", "--against", str(folder), "--pre-gate", str(fitted)]
    assert run([*scored, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["comparison"]["mean_kld"]["value"] > 0 and "fitted on" in result["pre_gate"]
    assert run(scored) == 0 and "pre-gate" in capsys.readouterr().out
    paged = ["run", str(folder), "--prompt", "line", "--raw", "--max-new-tokens", "8", "--slots"]
    paged += ["5", "--json", "--pre-gate", str(fitted)]
    assert run(paged) == 0
    found = json.loads(capsys.readouterr().out)
    assert "fitted on" in found["pre_gate"] and found["paging"]["prefetch_issued_bytes"] > 0
    assert "pre-gate" in {term["name"] for term in found["terms"]}
    assert run([*paged, "--no-prefetch"]) == 0
    unread = json.loads(capsys.readouterr().out)
    assert unread["text"] == found["text"] and not unread["paging"]["prefetch_issued_bytes"]
    assert run([*paged, "--predictor", "router"]) == 2
    assert "leave out one or the other" in " ".join(capsys.readouterr().err.split())
    other = ["run", str(tiny_checkpoint("olmoe")), *paged[2:]]
    assert run(other) == 2
    assert "was fitted for another model" in " ".join(capsys.readouterr().err.split())


class Decided:
    """A routing that has decided: rows of the layers after the first."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def coming(self, layer: int) -> list[list[int]]:
        return self.rows[layer:]


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert done()


def test_reads_what_is_nearest_first_and_the_rest_as_slots_get_free() -> None:
    """Two slots; layer 0 uses row 0, and later layers rows 2, 0, 2 (all of one size)."""
    store = MemoryStore(num_layers=4)
    cache = ExpertCache(store, SlotBuffers({4: 2, 8: 1}, torch.device("cpu")), LeastRecentlyUsed)
    routing: Any = Decided([[2], [0], [2]])
    prefetcher = CertainPrefetcher(routing, store, cache)
    hidden, path = torch.zeros(1, 2), [(0, 0), (1, 2), (2, 0), (3, 2)]
    acquire(cache, path[0])
    cache.release(path[0])
    for layer, key in enumerate(path):
        prefetcher.observe(layer, [key[1]])
        prefetcher.predict(layer, hidden, [key[1]])
        if layer < 3:
            wait_until(lambda after=layer + 1: cache.is_resident(path[after]))  # type: ignore[misc]
            wait_until(lambda: not prefetcher.queued_bytes)
        assert cache.is_resident(key)  # what is in use did not leave for what comes
        acquire(cache, key)
        cache.release(key)
    prefetcher.close()
    statistics = cache.statistics
    assert (statistics.misses, statistics.hits) == (1, 4)  # nothing but the very first
    assert statistics.prefetch_useful_bytes == 3 * 4 and not statistics.prefetch_wasted_bytes
    cache.check_integrity()
