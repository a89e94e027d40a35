"""Dense segments replayed on fixed memory: the logits of the plain path, token after token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import TinyCheckpoint
from recorded_graphs import RecordedCapture

from edge_moe.errors import InputError
from edge_moe.families import FAMILIES
from edge_moe.runtime.dense_graphs import Capture, DenseGraphs, GraphedStep
from edge_moe.runtime.interleaved_trial import InterleavedTrial
from edge_moe.runtime.kv_cache import make_cache
from edge_moe.runtime.session import Session
from edge_moe.runtime.torch_decoder import Decoder

FloatArray = npt.NDArray[np.float32]

PROMPT = list(range(5, 15))
TOKENS = [int(token) for token in np.random.default_rng(1).integers(1, 250, 40)]
CONTEXT = 64


class Sequence:
    """One prompt through the model, and then tokens by replay."""

    def __init__(self, session: Session) -> None:
        self.capture = RecordedCapture()
        self.cache = make_cache(session.model.config, CONTEXT, is_zeroed=True)
        residency = session._residency
        modules = [block.experts for block in residency.blocks]
        self.step = GraphedStep(
            *(session.model, self.cache, residency.pager, modules, self.capture, CONTEXT),
            shortest_length=16,
        )
        with torch.inference_mode():
            session.model(
                input_ids=torch.tensor([PROMPT]), past_key_values=self.cache, use_cache=True
            )

    def logits(self, token: int) -> FloatArray:
        with torch.inference_mode():
            found = self.step.step(token)
        assert found is not None, self.step.reason
        values: FloatArray = found.numpy().copy()
        return values


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_the_logits_of_the_plain_path(
    family: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    with Session.open(tiny_checkpoint(family), context_tokens=CONTEXT, kernels="exact") as session:
        sequence = Sequence(session)
        if sequence.step.reason:
            assert "window or a state" in sequence.step.reason
            pytest.skip(sequence.step.reason)
        loop = session.new_loop()
        loop.prefill(PROMPT)
        for token in TOKENS:
            wanted = loop.step([token])[0]
            found = sequence.logits(token)
            np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)
        lengths = {16, 32, 64}  # of 10 + 40 tokens
        num_stops = session.spec.num_moe_layers
        assert sequence.capture.num_graphs == len(lengths) * (num_stops + 1)
        assert sequence.cache.layers[0].get_seq_length() == len(PROMPT) + len(TOKENS)


def decoded(session: Session, graphs: DenseGraphs | None) -> list[FloatArray]:
    loop = Decoder(session.model, session.device, CONTEXT, graphs=graphs)
    loop.prefill(PROMPT)
    return [loop.step([token])[0] for token in TOKENS]


def graphs_of(
    session: Session, capture: Capture, trial: InterleavedTrial | None = None
) -> DenseGraphs:
    residency = session._residency
    modules = [block.experts for block in residency.blocks]
    return DenseGraphs(*(session.model, residency.pager, modules, capture, CONTEXT), trial=trial)


def test_sequences_are_replayed_while_experts_page(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    with Session.open(folder, context_tokens=CONTEXT, num_slots=3) as session:
        wanted = decoded(session, None)
        graphs = graphs_of(session, RecordedCapture())
        for _ in range(2):  # every sequence has a cache of its own
            np.testing.assert_allclose(decoded(session, graphs), wanted, atol=1e-4, rtol=1e-4)
        assert graphs.label == "on" and session.statistics().misses > 0
        session.check_integrity()
        with session.tracing() as recorder:
            decoded(session, graphs)
        assert recorder.finish(session.trace_info()).num_tokens == len(PROMPT) + len(TOKENS)


def test_both_are_tried_by_turns(tiny_checkpoint: TinyCheckpoint) -> None:
    with Session.open(tiny_checkpoint("olmoe"), context_tokens=CONTEXT) as session:
        trial = InterleavedTrial()
        graphs = graphs_of(session, RecordedCapture(), trial)
        decoded(session, graphs)
        assert trial.verdict is None and "too few tokens" in graphs.label
        decoded(session, graphs)
        assert trial.verdict is not None
        assert graphs.label == ("on" if trial.verdict else "off (no faster here)")


def test_code_that_asks_the_device_is_not_captured(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session.open(tiny_checkpoint("qwen3_moe"), context_tokens=CONTEXT) as session:
        wanted = decoded(session, None)
        norm = session.model.model.norm
        plain = norm.forward

        def asking(hidden: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = plain(hidden)
            return found if found.max().item() < 1e9 else hidden

        monkeypatch.setattr(norm, "forward", asking)
        graphs = graphs_of(session, RecordedCapture())
        found = decoded(session, graphs)
        assert "off (capturing failed: the host asked for a value" in graphs.label
        assert all(map(np.array_equal, found, wanted))
        assert graphs.start(make_cache(session.model.config, CONTEXT)) is None


def test_numbers_that_were_baked_in_are_noticed(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session.open(tiny_checkpoint("qwen3_moe"), context_tokens=CONTEXT) as session:
        wanted = decoded(session, None)
        embedding = session.model.get_input_embeddings()
        plain = embedding.forward
        seen: list[int] = []

        def counting(ids: torch.Tensor) -> torch.Tensor:
            seen.append(len(seen))
            found: torch.Tensor = plain(ids)
            return found * float(1 + len(seen) % 5)  # a number of the host's, not the token's

        monkeypatch.setattr(embedding, "forward", counting)
        graphs = graphs_of(session, RecordedCapture())
        decoded(session, graphs)
        assert graphs.label == "off (replayed logits differ from what the model's code gives)"
        monkeypatch.undo()
        assert all(map(np.array_equal, decoded(session, graphs), wanted))


def test_a_failed_read_is_no_reason_not_to_capture(tiny_checkpoint: TinyCheckpoint) -> None:
    with Session.open(tiny_checkpoint("qwen3_moe"), context_tokens=CONTEXT) as session:
        graphs, pager = graphs_of(session, RecordedCapture()), session._residency.pager
        loop = Decoder(session.model, session.device, CONTEXT, graphs=graphs)
        loop.prefill(PROMPT)
        plain, calls = pager.forward, []

        def failing(*arguments: Any) -> torch.Tensor:
            calls.append(arguments)
            if len(calls) == session.spec.num_moe_layers + 1:  # the first one while capturing
                raise OSError("injected")
            return plain(*arguments)

        pager.forward = failing  # type: ignore[method-assign,assignment]
        with pytest.raises(OSError, match="injected"):
            loop.step([TOKENS[0]])
        pager.forward = plain  # type: ignore[method-assign]
        assert not graphs.reason
        found = [loop.step([token])[0] for token in TOKENS]
        np.testing.assert_allclose(found, decoded(session, None), atol=1e-4, rtol=1e-4)


def test_a_cpu_has_nothing_to_capture_on(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    with pytest.raises(InputError, match="leave --graphs out"):
        Session.open(folder, device="cpu", graphs=True)
    with Session.open(folder, device="cpu") as session:
        assert session.graphs == "" and session._graphs is None


@pytest.mark.gpu
def test_graphs_on_a_gpu(tiny_checkpoint: TinyCheckpoint) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = tiny_checkpoint("qwen3_moe")
    rows = {}
    for graphs in (False, True):
        with Session.open(
            folder, device="cuda", num_slots=4, context_tokens=CONTEXT, graphs=graphs
        ) as session:
            loop = session.new_loop()
            loop.prefill(PROMPT)
            rows[graphs] = np.stack([loop.step([token])[0] for token in TOKENS])
            assert session.graphs == ("on" if graphs else "off (--no-graphs)")
    difference = np.linalg.norm(rows[True] - rows[False])
    assert difference < 0.05 * np.linalg.norm(rows[False])
