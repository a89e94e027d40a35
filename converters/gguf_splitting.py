"""How a tokenizer cuts text before merging, and llama.cpp's name for it.

llama.cpp knows the steps of byte-level BPE by name only. Its regex for `gpt-4o` and `tekken` takes
letters outside ASCII for both cases, so that text in other scripts may be cut elsewhere; so do its
own GGUF files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_moe.errors import TargetError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_QWEN2 = rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    rf"\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
_DIGITS = "single digits"

Steps = tuple[str, ...]
"""Regexes that cut the text one after the other, before bytes."""


@dataclass(frozen=True)
class Splitting:
    """One of llama.cpp's."""

    name: str
    """`tokenizer.ggml.pre`."""
    steps: Steps
    ignores_merges: bool = False
    """A word that is in the vocabulary is taken whole, without merging."""


_KNOWN = (
    Splitting("qwen2", (_QWEN2,)),
    Splitting("gpt-2", (_GPT2,)),
    Splitting("llama-bpe", (_LLAMA3,), ignores_merges=True),
    Splitting("smaug-bpe", (_LLAMA3,)),
    Splitting("qwen35", (_QWEN35,)),
    Splitting("gpt-4o", (_O200K,)),
    Splitting("tekken", (_TEKKEN,), ignores_merges=True),
    Splitting("refact", (_DIGITS, _GPT2)),
    Splitting("deepseek-v3", (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3)),
)
KNOWN_NAMES = tuple(splitting.name for splitting in _KNOWN)


def find_splitting(step: dict[str, Any] | None, ignores_merges: bool, path: Path) -> Splitting:
    """llama.cpp's splitting that cuts as the `pre_tokenizer` of tokenizer.json.

    The one that treats merges alike comes first.

    Raises:
        TargetError: there is none.
    """
    steps = _steps((step or {}).get("pretokenizers") or [step or {}])
    found = [splitting for splitting in _KNOWN if splitting.steps == steps]
    if not found:
        raise TargetError(
            f"target gguf does not know the pre-tokeniser of {path}; known are "
            f"{', '.join(KNOWN_NAMES)}: use --target native"
        )
    return next((one for one in found if one.ignores_merges == ignores_merges), found[0])


def _steps(steps: Sequence[dict[str, Any]]) -> Steps | None:
    """The regexes in front of the bytes; None where a step is no such thing."""
    *splits, byte_level = steps
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        return None
    regexes = [_regex(step) for step in splits]
    if byte_level.get("use_regex", True):
        regexes.append(_GPT2)
    return tuple(str(regex) for regex in regexes) if all(regexes) else None


def _regex(step: dict[str, Any]) -> str | None:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return _DIGITS
    ways = (step.get("behavior"), bool(step.get("invert")))
    # every character matches: removing what does not match is the same as cutting what does
    if step.get("type") != "Split" or ways not in (("Isolated", False), ("Removed", True)):
        return None
    found = (step.get("pattern") or {}).get("Regex")
    if not isinstance(found, str):
        return None
    return found.replace("\r", r"\r").replace("\n", r"\n")  # some files hold the characters


def is_reached_by_merges(vocabulary: Sequence[str], merges: Sequence[str]) -> bool:
    """Whether merging the characters of every token gives the token.

    It then does not matter whether words in the vocabulary are merged or taken whole.
    """
    ranks = {tuple(merge.split(" ", 1)): rank for rank, merge in enumerate(merges)}
    return all(len(_merged(list(token), ranks)) == 1 for token in vocabulary)


def _merged(parts: list[str], ranks: dict[tuple[str, ...], int]) -> list[str]:
    while len(parts) > 1:
        pairs = [ranks.get(pair, len(ranks)) for pair in zip(parts, parts[1:], strict=False)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] == len(ranks):
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
