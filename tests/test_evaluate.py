"""Evaluation with bigram models whose logits are known, and of real models and files."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan, uniform_forms
from rich.console import Console

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import CheckpointError, EdgeMoeError, InputError, MissingExtraError
from edge_moe.eval_table import print_eval
from edge_moe.measurement import EvalResult
from edge_moe.metrics import Estimate
from edge_moe.runtime import evaluate as module
from edge_moe.runtime import heldout
from edge_moe.runtime.evaluate import evaluate, score_windows, solve_problems

TEXT = "the cat sat on the mat and the dog sat on the log\n" * 20


class ByteTokenizer:
    """Every byte is a token, plus one for the end of a document."""

    eos_token_id = 256

    def __init__(self, shift: int = 0) -> None:
        self._shift = shift

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, **_options: Any) -> list[int]:
        return [(byte + self._shift) % 256 for byte in text.encode()]

    def decode(self, ids: Sequence[int], **_options: Any) -> str:
        return bytes(token for token in ids if token < 256).decode()


class BigramModel:
    """Logits depend on the last token only: row `token` of a [257, 257] table."""

    def __init__(self, table: npt.NDArray[np.float32], answers: Mapping[str, str] | None = None):
        self.table = table
        self.tokenizer = ByteTokenizer()
        self.is_closed = False
        self._answers = answers or {}

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return self.table[list(token_ids)]

    def generate(self, prompt: str, *, max_new_tokens: int, stop: Sequence[str]) -> Iterator[str]:
        assert "\n" in stop and max_new_tokens > 10
        yield from self._answers.get(prompt, "no idea").split("|")

    def close(self) -> None:
        self.is_closed = True


def random_table(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, (257, 257)).astype(np.float32)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, BigramModel]:
    """Models that `evaluate` finds under the paths `full` and `small`."""
    found = {"full": BigramModel(random_table(0)), "small": BigramModel(random_table(1))}
    monkeypatch.setattr(module, "open_model", lambda path, **_options: found[path.name])
    return found


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "cats.jsonl"
    path.write_text(json.dumps({"text": TEXT}) + "\n")
    return str(path)


def test_perplexity_alone_is_that_of_the_table(models: dict[str, BigramModel], task: str) -> None:
    models["full"].table[:] = 0
    (result,) = evaluate(Path("full"), None, [task], window_tokens=64)
    assert result.perplexity.value == pytest.approx(257)
    assert result.base_perplexity is None and result.comparison is None
    assert result.recovery_percent is None
    assert result.in_task is None
    assert models["full"].is_closed


def test_a_model_against_itself(models: dict[str, BigramModel], task: str) -> None:
    (result,) = evaluate(Path("full"), Path("full"), [task], window_tokens=64)
    assert result.comparison is not None
    assert result.comparison.mean_kld.value == 0
    assert result.comparison.same_top_p.value == 1
    assert result.recovery_percent == pytest.approx(100)
    heldout = "\n".join(TEXT.splitlines()[-4:])  # a fifth of the lines
    assert result.num_tokens == len(heldout) - result.num_windows  # one per window is not scored


def test_against_another_model(models: dict[str, BigramModel], task: str) -> None:
    (result,) = evaluate(Path("small"), Path("full"), [task], window_tokens=64, max_windows=3)
    assert result.num_windows == 3
    assert result.num_tokens == 3 * 63
    found, base = result.comparison, result.base_perplexity
    assert found is not None and base is not None
    assert found.mean_kld.value > 0.5
    assert found.ppl_ratio.value == pytest.approx(result.perplexity.value / base.value)
    assert result.recovery_percent == pytest.approx(100 / found.ppl_ratio.value)
    assert result.recovery_of == "1 / perplexity"
    # d(1/r) = dr / r**2, and dr = r * d(ln r)
    error = 100 * found.ln_ppl_ratio.error / found.ppl_ratio.value
    assert result.recovery_error_percent == pytest.approx(error)


def test_kld_over_windows_by_hand(models: dict[str, BigramModel]) -> None:
    """KL(base || Q) of the rows that were passed through, averaged over scored tokens."""
    windows = [[1, 2, 3], [4, 5]]
    base, model = models["full"], models["small"]
    scores = score_windows({"small": model}, base, windows)["small"]
    expected = []
    for row in (1, 2, 4):  # the last row of a window predicts a token that is not there
        p, q = (np.exp(x) / np.exp(x).sum() for x in (base.table[row], model.table[row]))
        expected.append(float((p * np.log(p / q)).sum()))
    assert scores.kld == pytest.approx(expected, rel=1e-5)


def test_reference_is_computed_once_per_window(models: dict[str, BigramModel]) -> None:
    calls: list[int] = []

    class Counting(BigramModel):
        def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
            calls.append(len(token_ids))
            return super().logits(token_ids)

    rivals = {"a": models["small"], "b": models["full"], "c": models["small"]}
    score_windows(rivals, Counting(random_table(0)), [[1, 2, 3]] * 4)
    assert calls == [3] * 4


def test_in_task_comes_from_the_plan(
    models: dict[str, BigramModel], task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    (small / "plan.json").touch()

    class FakePlan:
        tasks = ("other",)
        search = None

        @classmethod
        def load(cls, _path: Path) -> FakePlan:
            return cls()

    monkeypatch.setattr(heldout, "Plan", FakePlan)
    assert evaluate(small, None, [task])[0].in_task is False
    monkeypatch.setattr(FakePlan, "tasks", (Path(task).name,))
    assert evaluate(small, None, [task])[0].in_task is True


def test_problems_are_solved_by_exact_match() -> None:
    answers = {"1+1": " 1 + 1 = 2. |The answer is 2.", "2+2": " The answer is 5.", "3+3": "six"}
    problems = [
        {"prompt": "1+1", "answer": "2"},
        {"prompt": "2+2", "answer": "4"},
        {"prompt": "3+3", "answer": "6"},
    ]
    assert solve_problems(BigramModel(random_table(0), answers), problems) == [True, False, False]


def test_recovery_is_by_exact_match_where_there_are_problems(
    models: dict[str, BigramModel], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [{"prompt": "p", "answer": "7"}, {"prompt": "q", "answer": "8"}]
    monkeypatch.setattr(module, "task_problems", lambda _task, _count: problems)
    models["full"]._answers = {"p": "The answer is 7", "q": "The answer is 8"}
    models["small"]._answers = {"p": "The answer is 7"}
    (result,) = evaluate(Path("small"), Path("full"), [task])
    assert result.exact_match is not None and result.exact_match.value == 0.5
    assert result.recovery_percent == pytest.approx(50)
    assert result.recovery_of == "exact match"
    paired = 100 * 2 / 3 * math.sqrt(2 / (2 * 3))  # 1 and 2 of 2 solved, 1 of them by both
    assert result.recovery_error_percent == pytest.approx(paired)
    assert result.num_problems == 2


def test_logits_that_are_not_finite(models: dict[str, BigramModel], task: str) -> None:
    models["small"].table[ord("t")] = np.nan
    with pytest.raises(InputError, match="small computes logits that are not finite"):
        evaluate(Path("small"), Path("full"), [task])
    assert models["small"].is_closed


def test_different_tokenizers(models: dict[str, BigramModel], task: str) -> None:
    models["small"].tokenizer = ByteTokenizer(shift=1)
    with pytest.raises(InputError, match="small and full have different tokenizers"):
        evaluate(Path("small"), Path("full"), [task])


def test_different_vocabularies(models: dict[str, BigramModel], task: str) -> None:
    models["small"].table = models["small"].table[:, :-1]
    with pytest.raises(InputError, match="vocabulary of 256 tokens, the reference of 257"):
        evaluate(Path("small"), Path("full"), [task])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_tokens": 1}, "--window-tokens is 1, which predicts nothing"),
        ({"max_windows": 0}, "--max-windows is 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(Path("full"), None, ["code"], **options)


def test_no_task() -> None:
    with pytest.raises(InputError, match="no task to evaluate on"):
        evaluate(Path("full"), None, [])


def test_table_names_what_llama_perplexity_prints(
    models: dict[str, BigramModel], task: str
) -> None:
    results = evaluate(Path("small"), Path("full"), [task], window_tokens=64)
    results.append(results[0].model_copy(update={"task": "code", "in_task": True}))
    console = Console(record=True, width=120, file=io.StringIO())
    print_eval(results, console)
    text = console.export_text()
    for name in ("Mean PPL(Q)/PPL(base)", "Mean KLD", "99.0% KLD", "Same top p", "in task"):
        assert name in text


def test_many_tasks_become_rows(models: dict[str, BigramModel], task: str) -> None:
    results = evaluate(Path("small"), Path("full"), [task] * 5, window_tokens=64)
    console = Console(record=True, width=150, file=io.StringIO())
    print_eval(results, console)
    text = console.export_text()
    assert results[0].comparison is not None
    assert text.count(f"{results[0].comparison.mean_kld}") == 5
    assert "Maximum KLD" not in text


def test_many_tasks_fit_110_columns_unwrapped(
    models: dict[str, BigramModel], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [{"prompt": "p", "answer": "7"}, {"prompt": "q", "answer": "8"}]
    monkeypatch.setattr(module, "task_problems", lambda _task, _count: problems)
    models["full"]._answers = {"p": "The answer is 7", "q": "The answer is 8"}
    results = evaluate(Path("small"), Path("full"), [task] * 4, window_tokens=64)
    wide = Estimate(114.43, 0.73)
    assert results[0].comparison is not None
    results = [
        result.model_copy(
            update={"task": "arithmetic", "in_task": False, "perplexity": wide}
            | {"base_perplexity": wide, "recovery_of": kind}
        )
        for result, kind in zip(results, ["1 / perplexity", "exact match"] * 2, strict=True)
    ]
    console = Console(record=True, width=110, file=io.StringIO())
    print_eval(results, console)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 110
    assert text.count("arithmetic (off task)") == 8  # a line per task in both tables
    assert "recovery: 1 / perplexity" in text and "recovery: exact match" in text


def test_json_round_trip(models: dict[str, BigramModel], task: str, tmp_path: Path) -> None:
    (result,) = evaluate(Path("small"), Path("full"), [task])
    assert EvalResult.load(result.save(tmp_path)) == result


def test_gguf_logits_and_text_are_those_of_transformers(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """The whole adapter: logits, tokenizer and greedy text of a file with every expert in bf16."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edge_moe.converters.export_gguf import export_gguf
    from edge_moe.runtime.gguf_logits import GgufModel

    folder = tiny_checkpoint("qwen3_moe")
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, checkpoint.spec.num_experts), "gguf")
    path = export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    text = "the cat sat on the mat"
    ids = tokenizer.encode(text, add_special_tokens=False)
    with GgufModel(path, context_tokens=256) as model:
        assert model.tokenizer.encode(text, add_special_tokens=False) == ids
        logits = model.logits(ids)
        found = "".join(model.generate(text, max_new_tokens=8))
        with pytest.raises(InputError, match="300 tokens do not fit a context of 256"):
            model.logits([1] * 300)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
        output = reference.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    assert np.abs(logits - expected).max() < 2e-2
    expected_text = str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    # a random model writes broken UTF-8, which the two libraries show differently
    assert _ascii(found) == _ascii(expected_text) != ""


def _ascii(text: str) -> str:
    return "".join(letter for letter in text if letter.isascii())


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="does not exist: give the path of a GGUF file"):
        evaluate(path, None, ["code"])
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(CheckpointError, match="model.gguf"):
        evaluate(path, None, ["code"])


@pytest.mark.parametrize(
    ("key", "number", "error", "reason"),
    [
        ("rope.dimension_count", 8, InputError, "GGML_ASSERT"),
        ("expert_used_count", 17, InputError, "cannot load it"),
        ("context_length", 4 * 10**9, CheckpointError, "context_length is 4000000000, at most"),
    ],
)
def test_a_gguf_file_that_llama_cpp_aborts_on(
    key: str,
    number: int,
    error: type[EdgeMoeError],
    reason: str,
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    """In this process it would end the tests."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    from edge_moe.converters.export_gguf import export_gguf

    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, checkpoint.spec.num_experts), "gguf")
    path = export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    field = gguf.GGUFReader(path, "r+").fields[f"qwen3moe.{key}"]
    field.parts[field.data[0]][0] = number
    with pytest.raises(error, match=reason):
        evaluate(path, None, ["code"])


def test_gguf_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtraError, match=r"edge-moe\[gguf\]"):
        evaluate(tmp_path / "model.gguf", None, ["code"])
