"""One engine of `soak.py` in a process of its own: a line of JSON per sample and disk error.

    python benchmarks/soak_worker.py ENGINE MODEL TEXT FOLDER BUDGET_BYTES CONTEXT SECONDS EVERY

ENGINE: gguf or native. What it is asked is drawn from TEXT with a fixed seed. Nothing is kept
between two samples, so that what grows is the engine's.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import hashlib
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soak_faults import (
    EXPECTED,
    INJECTED,
    copied,
    damage,
    failing_reads,
    is_expected,
    provoked,
)

from edge_moe.errors import EdgeMoeError, InputError

FIXED_TOKENS, FIXED_NEW_TOKENS = 24, 16
MOST_NEW_TOKENS = 32
CHAT_TURNS = 6
FAULT_SECONDS = 30
"""All kinds of disk errors happen once, and each again while there is this much time for each."""
ERRORS = (EdgeMoeError, OSError)


def opener(engine: str, budget_bytes: int, context_tokens: int) -> Callable[[Path], Any]:
    """Opens a model as a session under the budget."""
    options: dict[str, Any] = {"budget_bytes": budget_bytes, "context_tokens": context_tokens}
    if engine == "gguf":
        from edge_moe.runtime.gguf_session import GgufSession

        return lambda path: GgufSession.open(path, **options)
    from edge_moe.runtime.session import Session

    return lambda path: Session.open(path, **options)


class Soak:
    """A session, and what it is asked."""

    def __init__(self, opens: Callable[[Path], Any], model: Path, text: str, folder: Path) -> None:
        self.opens, self.model, self.text, self.folder = opens, model, text, folder
        self.chance = random.Random(0)
        self.totals = dict.fromkeys(("misses", "evictions", "page_in_bytes"), 0)
        self.steps: dict[str, int] = {}
        self.opened = self.answers = self.tokens = self.fixed_answers = self.changed_answers = 0
        self.session = self.open(model)
        self.context_tokens: int = self.session.context_tokens
        self.expected = self.fixed()
        self.start = time.monotonic()

    def open(self, path: Path) -> Any:
        self.opened += 1
        return self.opens(path)

    def close(self) -> None:
        found = self.session.statistics()
        for name in self.totals:
            self.totals[name] += getattr(found, name)
        self.session.close()
        self.session = None

    def reopen(self) -> None:
        """Another session for the same model."""
        self.close()
        self.session = self.open(self.model)

    # ------------------------------------------------------------------ what is asked

    def step(self) -> None:
        """One of the kinds of work below."""
        kinds = (self.prompt, self.prompt, self.chat, self.sampled, self.whole, self.stopped)
        kind = self.chance.choice((*kinds, self.too_long))
        kind()
        self.steps[kind.__name__] = self.steps.get(kind.__name__, 0) + 1
        self.session.check_integrity()

    def prompt(self) -> None:
        """A greedy answer to a prompt of any length, short ones as often as long ones."""
        most = self.context_tokens - MOST_NEW_TOKENS
        self.greedy(self.ids(int(most ** self.chance.random())), self.new_tokens())

    def whole(self) -> None:
        """To the last token of the context."""
        self.greedy(self.ids(self.context_tokens - 4), 100, stop_at_eos=False)

    def sampled(self) -> None:
        """Text drawn at random."""
        prompt = self.words(self.chance.randint(1, self.context_tokens // 2))
        self.generate(prompt, temperature=0.8, top_p=0.95, seed=self.chance.getrandbits(32))

    def chat(self) -> None:
        """Turn by turn, until the context is full; of a model without a template, a text."""
        if not self.session.has_chat_template:
            return self.sampled()
        messages: list[dict[str, str]] = []
        for turn in range(CHAT_TURNS):
            question = self.words(self.chance.randint(4, 160))
            messages.append({"role": "user", "content": question})
            try:
                said = self.generate(messages, temperature=0.7 * (turn % 2), seed=turn)
            except InputError:  # longer than the context
                break
            messages.append({"role": "assistant", "content": said})
        return None

    def stopped(self) -> None:
        """Somebody reads three pieces and leaves."""
        pieces = self.session.generate(
            self.words(min(100, self.context_tokens // 2)), max_new_tokens=MOST_NEW_TOKENS
        )
        for _ in range(3):
            next(pieces, None)
        pieces.close()
        self.count()

    def too_long(self) -> None:
        """A prompt that the context does not hold."""
        try:
            self.generate(self.words(self.context_tokens * 6))
        except InputError:
            return
        raise RuntimeError("a prompt longer than the context was answered")

    def greedy(self, ids: list[int], new_tokens: int, *, stop_at_eos: bool = True) -> None:
        self.session.generate_ids(ids, new_tokens, stop_at_eos=stop_at_eos)
        self.count()

    def generate(self, prompt: Any, **options: Any) -> str:
        text = "".join(self.session.generate(prompt, max_new_tokens=self.new_tokens(), **options))
        self.count()
        return text

    def count(self) -> None:
        timing = self.session.timing
        self.answers += 1
        self.tokens += timing.prompt_tokens + timing.generated_tokens

    def new_tokens(self) -> int:
        return self.chance.randint(1, MOST_NEW_TOKENS)

    def words(self, num_chars: int) -> str:
        """Some of the text, repeated where it is too short."""
        start = self.chance.randrange(len(self.text))
        return (self.text[start:] + self.text * (1 + num_chars // len(self.text)))[:num_chars]

    def ids(self, num_tokens: int) -> list[int]:
        found: list[int] = self.session.prompt_ids(self.words(6 * num_tokens))
        return found[:num_tokens]

    # ------------------------------------------------------------------ what is checked

    def fixed(self) -> str:
        """Digest of a greedy answer and of logits."""
        ids = self.session.prompt_ids(self.text[:1000])[:FIXED_TOKENS]
        answer = self.session.generate_ids(ids, FIXED_NEW_TOKENS, stop_at_eos=False)
        digest = hashlib.sha256(json.dumps(answer).encode())
        digest.update(self.session.logits(ids).tobytes())
        return digest.hexdigest()

    def is_same(self) -> bool:
        """Whether the fixed prompt is still answered as in the beginning."""
        self.session.check_integrity()
        is_same = self.fixed() == self.expected
        self.fixed_answers += 1
        self.changed_answers += not is_same
        return is_same

    def fault(self, kind: str) -> dict[str, Any]:
        """A disk error, and the answer after it."""
        seconds = time.monotonic() - self.start
        if kind in INJECTED:
            with failing_reads(kind):
                error = provoked(self.answer, ERRORS)
            is_as_expected = is_expected(kind, error, self.model)
        else:
            with copied(self.model, self.folder) as copy:
                error = self.damaged(kind, copy)
                is_as_expected = is_expected(kind, error, copy)
        return {
            "kind": kind,
            "seconds": seconds,
            "seen": "no error" if error is None else self.named(error),
            "is_as_expected": is_as_expected,
            "is_repaired": self.is_same(),
        }

    def damaged(self, kind: str, copy: Path) -> str | None:
        """A session of the copy, whose file changes; then one of the model again."""
        self.close()
        self.session = self.open(copy)
        self.is_same()
        damage(kind, copy)
        error = provoked(self.answer, ERRORS)
        if error is None:
            self.is_same()
        self.reopen()
        return error

    def answer(self) -> None:
        """Some other prompt, so that experts have to come."""
        self.greedy(self.ids(self.context_tokens // 2), 2)

    def named(self, error: str) -> str:
        """Without this machine's folders."""
        return error.replace(f"{self.folder}/", "").replace(f"{self.model.parent}/", "")

    def sample(self) -> dict[str, Any]:
        """The process now; the next one's peak begins here."""
        status = Path("/proc/self/status").read_text()
        with open("/proc/self/maps", "rb") as handle:
            mappings = sum(1 for _ in handle)
        found = {
            "seconds": time.monotonic() - self.start,
            "rss_bytes": _kilobytes(status, "VmRSS"),
            "peak_bytes": _kilobytes(status, "VmHWM"),
            "data_bytes": _kilobytes(status, "VmData"),
            "mappings": mappings,
            "threads": int(_field(status, "Threads")),
            "files": len(os.listdir("/proc/self/fd")),
            "answers": self.answers,
            "tokens": self.tokens,
        }
        reset_peak()
        return found

    def ending(self) -> dict[str, Any]:
        """What was done."""
        seconds = time.monotonic() - self.start
        self.close()
        return {
            "seconds": seconds,
            "fixed_answers": self.fixed_answers,
            "changed_answers": self.changed_answers,
            "opened_sessions": self.opened,
            **self.totals,
            "steps": self.steps,
        }


def reset_peak() -> None:
    """VmHWM begins anew; where the system refuses, it stays the peak of the whole run."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _field(status: str, name: str) -> str:
    found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return found[1]


def _kilobytes(status: str, name: str) -> int:
    return 1024 * int(_field(status, name))


def say(kind: str, content: dict[str, Any]) -> None:
    print(json.dumps({kind: content}), flush=True)


def run(soak: Soak, seconds: float, every_seconds: float) -> None:
    """Ask until the time is over; disk errors and sessions opened anew come at even distances."""
    kinds = [*EXPECTED, "reopen"]
    events = kinds * max(1, int(seconds / FAULT_SECONDS / len(kinds)))
    done, sampled = 0, 0
    while (spent := time.monotonic() - soak.start) < seconds or done < len(events):
        soak.step()
        if done < len(events) and spent >= (done + 0.5) * seconds / len(events):
            if events[done] == "reopen":
                soak.reopen()
            else:
                say("fault", soak.fault(events[done]))
            done += 1
        if spent >= sampled * every_seconds:
            soak.is_same()
            say("sample", soak.sample())
            sampled += 1
    soak.is_same()
    say("sample", soak.sample())
    say("ending", soak.ending())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=("gguf", "native"))
    for name in ("model", "text", "folder"):
        parser.add_argument(name, type=Path)
    for name in ("budget_bytes", "context"):
        parser.add_argument(name, type=int)
    for name in ("seconds", "every"):
        parser.add_argument(name, type=float)
    found = parser.parse_args()
    opens = opener(found.engine, found.budget_bytes, found.context)
    soak = Soak(opens, found.model, found.text.read_text(), found.folder)
    run(soak, found.seconds, found.every)


if __name__ == "__main__":
    main()
