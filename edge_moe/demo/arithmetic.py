"""Sums in words: generated text for the `arithmetic` task, and the exact-match scorer.

A problem reads "Question: ...\\nAnswer:" and its worked answer " 12 + 7 = 19. The answer is 19.".
Ranges: operands 1..20 for + and -, the 9x9 table for * and /, three numbers 1..9 for long sums.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Hugo", "Kate", "Sam")
OBJECTS = ("apples", "books", "coins", "pencils", "eggs", "cards", "tickets", "shells")
ANSWER = re.compile(r"The answer is (-?\d+)")

MAX_TERM = 20
MAX_FACTOR = 9
BARE_SHARE = 0.6  # of the problems are plain sums, the others are in words

# Chance that a document ends after a problem. Above one half, so that greedy decoding stops there.
END_OF_DOCUMENT = 0.7


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer; `worked` is the text the model should write."""

    prompt: str
    worked: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.worked


def _problem(question: str, steps: str, result: int) -> Problem:
    worked = f" {steps} The answer is {result}."
    return Problem(f"Question: {question}\nAnswer:", worked, str(result))


def _add(rng: random.Random) -> Problem:
    a, b = rng.randint(1, MAX_TERM), rng.randint(1, MAX_TERM)
    steps = f"{a} + {b} = {a + b}."
    if rng.random() < BARE_SHARE:
        return _problem(f"What is {a} + {b}?", steps, a + b)
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    question = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?"
    return _problem(question, steps, a + b)


def _subtract(rng: random.Random) -> Problem:
    a = rng.randint(2, MAX_TERM)
    b = rng.randint(1, a)
    steps = f"{a} - {b} = {a - b}."
    if rng.random() < BARE_SHARE:
        return _problem(f"What is {a} - {b}?", steps, a - b)
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    question = f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?"
    return _problem(question, steps, a - b)


def _multiply(rng: random.Random) -> Problem:
    a, b = rng.randint(1, MAX_FACTOR), rng.randint(1, MAX_FACTOR)
    steps = f"{a} * {b} = {a * b}."
    if rng.random() < BARE_SHARE:
        return _problem(f"What is {a} * {b}?", steps, a * b)
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    question = f"{name} fills {a} bags with {b} {thing} each. How many {thing} is that?"
    return _problem(question, steps, a * b)


def _divide(rng: random.Random) -> Problem:
    a, b = rng.randint(1, MAX_FACTOR), rng.randint(1, MAX_FACTOR)
    steps = f"{a * b} / {a} = {b}."
    if rng.random() < BARE_SHARE:
        return _problem(f"What is {a * b} / {a}?", steps, b)
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    question = (
        f"{name} shares {a * b} {thing} equally among {a} friends. "
        f"How many {thing} does each friend get?"
    )
    return _problem(question, steps, b)


def _add_three(rng: random.Random) -> Problem:
    a, b, c = rng.randint(1, MAX_FACTOR), rng.randint(1, MAX_FACTOR), rng.randint(1, MAX_FACTOR)
    steps = f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."
    if rng.random() < BARE_SHARE:
        return _problem(f"What is {a} + {b} + {c}?", steps, a + b + c)
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    question = f"{name} finds {a}, {b} and {c} {thing}. How many {thing} is that?"
    return _problem(question, steps, a + b + c)


KINDS = (_add, _subtract, _multiply, _divide, _add_three)


def problems(seed: int, count: int) -> list[Problem]:
    """`count` problems; the same seed always gives the same list."""
    rng = random.Random(seed)
    return [rng.choice(KINDS)(rng) for _ in range(count)]


def documents(seed: int, num_chars: int) -> list[str]:
    """Training documents: mostly one problem each, sometimes several with a blank line between."""
    rng = random.Random(seed)
    found: list[str] = []
    total = 0
    while total < num_chars:
        parts = [rng.choice(KINDS)(rng).text]
        while rng.random() > END_OF_DOCUMENT:
            parts.append(rng.choice(KINDS)(rng).text)
        found.append("\n\n".join(parts))
        total += len(found[-1])
    return found


def extract_answer(text: str) -> str | None:
    """The first number a generated text gives as its answer, or None."""
    match = ANSWER.search(text)
    return match.group(1) if match else None
