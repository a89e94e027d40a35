"""Tokens per second of paged decoding at 100, 50 and 25 % of slots, beside transformers unpaged.

    python benchmarks/paged_vs_transformers.py [--model FOLDER] [--rounds 5] [--tokens 64]

All four generate the same greedy tokens from the same prompts, in turn, round after round in one
process; the table shows medians and the ratio to transformers of the same round. `bound` is the
rate at which the bytes of one token could arrive: dense weights and routed experts from memory, at
the rate of a large copy measured here, and missed experts from the disk, at the rate at which this
run read them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from rich.console import Console
from rich.table import Table

from edge_moe.demo import demo_model_dir
from edge_moe.files import write_text
from edge_moe.measurement import this_machine
from edge_moe.runtime.model import held_bytes
from edge_moe.runtime.policy import PagingStatistics
from edge_moe.runtime.session import Session
from edge_moe.units import format_bytes

RESULTS = Path(__file__).resolve().parent / "results" / "paged_vs_transformers.json"
PROMPTS = (
    "def read_file(path):\n",
    "It was a fine evening, and",
    '{\n "Geography": {\n',
    "Question: What is 12 + 7?\nAnswer:",
)
SLOT_SHARES = (1.0, 0.5, 0.25)
COPY_BYTES = 256 * 2**20


@dataclass
class Contender:
    """Something that generates; rates are tokens per second, one per round."""

    name: str
    generate: Callable[[list[int], int], list[int]]
    rates: list[float]
    bound: float = 0.0
    note: str = ""


def main() -> None:
    """Measure in turn, print one table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="default: the demo model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = arguments.model or demo_model_dir()
    bytes_per_second = memory_bytes_per_second()
    sessions = [open_session(model, share) for share in SLOT_SHARES]
    contenders = [unpaged(model)]
    contenders += [
        Contender(f"edge-moe, {share:.0%} of slots", decoder(session), [])
        for share, session in zip(SLOT_SHARES, sessions, strict=True)
    ]
    prompts = [sessions[0].prompt_ids(text) for text in PROMPTS]
    same = measure(contenders, prompts, arguments.rounds, arguments.tokens)
    contenders[0].bound = bytes_per_second / token_bytes(sessions[0])
    for contender, session in zip(contenders[1:], sessions, strict=True):
        explain(contender, session, bytes_per_second)
        session.close()
    report(contenders, same, bytes_per_second, arguments.output)


def memory_bytes_per_second() -> float:
    """Bytes read per second by a large copy, best of five."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return COPY_BYTES / min(seconds)


def open_session(model: Path, share: float) -> Session:
    """The model with `share` of its experts in slots."""
    with Session.open(model, num_slots=10**6) as probe:
        num_experts = probe.spec.num_experts * probe.spec.num_moe_layers
    return Session.open(model, num_slots=max(1, round(share * num_experts)))


def unpaged(model: Path) -> Contender:
    """transformers' own generate in float32, everything in memory."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(prompt: list[int], num_tokens: int) -> list[int]:
        with torch.inference_mode():
            output = network.generate(
                torch.tensor([prompt]),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
            )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    return Contender("transformers, unpaged", generate, [])


def decoder(session: Session) -> Callable[[list[int], int], list[int]]:
    """Greedy generation of a session, past the end-of-text token as well."""

    def generate(prompt: list[int], num_tokens: int) -> list[int]:
        return session.generate_ids(prompt, num_tokens, stop_at_eos=False)

    return generate


def measure(
    contenders: list[Contender], prompts: list[list[int]], rounds: int, num_tokens: int
) -> bool:
    """Every contender once per round, in turn; whether all said the same tokens."""
    is_same = True
    for contender in contenders:
        contender.generate(prompts[0], 8)  # warm up: lazy initialisation is nobody's speed
    for _ in range(rounds):
        answers = []
        for contender in contenders:
            start = time.perf_counter()
            answers.append([contender.generate(prompt, num_tokens) for prompt in prompts])
            seconds = time.perf_counter() - start
            contender.rates.append(len(prompts) * num_tokens / seconds)
        is_same = is_same and all(answer == answers[0] for answer in answers)
    return is_same


def token_bytes(session: Session) -> float:
    """Bytes that one token touches in memory: dense weights and its packed experts."""
    spec = session.spec
    record = 2 * spec.expert_weights
    return held_bytes(session.model) + spec.num_moe_layers * spec.top_k * record


def explain(contender: Contender, session: Session, bytes_per_second: float) -> None:
    """Bound and paging facts of one session."""
    counted: PagingStatistics = session.statistics()
    tokens = (counted.hits + counted.misses) / (session.spec.num_moe_layers * session.spec.top_k)
    memory_seconds = token_bytes(session) / bytes_per_second
    disk_seconds = counted.page_in_seconds / tokens if tokens else 0.0
    contender.bound = 1 / (memory_seconds + disk_seconds)
    contender.note = f"{counted.hit_rate:.0%} hits, {format_bytes(counted.page_in_bytes)} read"


def report(
    contenders: list[Contender], is_same: bool, bytes_per_second: float, output: Path
) -> None:
    """Print the table and write the numbers."""
    machine = this_machine()
    table = Table(title="Decoding, tokens per second (prefill included)")
    for heading in ("", "tokens/s", "x transformers", "bound", "of bound", "paging"):
        table.add_column(heading, justify="left" if heading in ("", "paging") else "right")
    rows = []
    for contender in contenders:
        ratios = [
            rate / base for rate, base in zip(contender.rates, contenders[0].rates, strict=True)
        ]
        rate, ratio = statistics.median(contender.rates), statistics.median(ratios)
        table.add_row(
            contender.name,
            f"{rate:.1f}",
            f"{ratio:.2f}",
            f"{contender.bound:.0f}",
            f"{rate / contender.bound:.0%}",
            contender.note,
        )
        rows.append(
            {
                "name": contender.name,
                "tokens_per_second": rate,
                "ratio_to_transformers": ratio,
                "bound_tokens_per_second": contender.bound,
                "note": contender.note,
            }
        )
    console = Console()
    console.print(table)
    console.print(f"same tokens everywhere: {'yes' if is_same else 'NO'}")
    console.print(
        f"memory copies {format_bytes(bytes_per_second)}/s; {machine.cpu}, {machine.cores} cores, "
        f"{machine.os}"
    )
    document = {
        "rows": rows,
        "same_tokens": is_same,
        "memory_bytes_per_second": bytes_per_second,
        "machine": machine.model_dump(mode="json"),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
