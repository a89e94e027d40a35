"""tokenizer.json -> what llama.cpp's byte-level BPE reads from GGUF metadata.

llama.cpp knows pre-tokeniser regexes by name only, so a tokenizer whose regex is not recognised is
refused: it would load and split text differently. One difference remains: llama.cpp does not apply
the NFC normaliser of Qwen tokenizers, so text in decomposed Unicode gets other ids there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_moe.errors import TargetError

# llama.cpp's name -> the Split regex in front of a ByteLevel step without its own regex
_SPLIT_REGEXES = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
_BYTE_LEVEL_REGEX_NAME = "gpt-2"  # what ByteLevel(use_regex=True) stands for

# gguf.TokenType
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class GgufVocabulary:
    """Token list and special ids; V entries, one per row of the embedding."""

    pre_tokenizer: str
    """`tokenizer.ggml.pre`."""
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    """`left right` in order of rank."""
    special_ids: dict[str, int]
    """bos, eos, unk, sep, pad -> token id, where the tokenizer has one."""
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def read_vocabulary(folder: Path, vocab_size: int) -> GgufVocabulary:
    """The vocabulary of the checkpoint in `folder`, filled up to `vocab_size` with unused tokens.

    Raises:
        TargetError: no tokenizer.json, or one that llama.cpp's byte-level BPE cannot reproduce.
    """
    path = folder / "tokenizer.json"
    tokenizer = _read_json(path)
    if not tokenizer:
        raise TargetError(f"target gguf needs {path}: save the tokenizer as a fast one first")
    model = tokenizer.get("model") or {}
    _check_model(model, tokenizer.get("normalizer"), path)
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens") or []}
    names = {token_id: token for token, token_id in model["vocab"].items()}
    names |= {token_id: entry["content"] for token_id, entry in added.items()}
    if max(names, default=0) >= vocab_size:
        raise TargetError(
            f"target gguf: {path} holds token id {max(names)}, but the embedding has "
            f"{vocab_size} rows: the tokenizer does not belong to this checkpoint"
        )
    config = _read_json(folder / "tokenizer_config.json")
    ids = {token: token_id for token_id, token in names.items()}
    bos, eos = _added_around(tokenizer.get("post_processor"))
    return GgufVocabulary(
        pre_tokenizer=_pre_tokenizer_name(tokenizer.get("pre_tokenizer"), path),
        tokens=[names.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)],
        token_types=[_token_type(token_id, names, added) for token_id in range(vocab_size)],
        merges=[m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []],
        special_ids=_special_ids(config, _read_json(folder / "config.json"), ids, vocab_size),
        adds_bos=bos,
        adds_eos=eos,
        chat_template=_chat_template(folder, config),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TargetError(f"{path} is not readable JSON ({error}): download it again") from None
    return content if isinstance(content, dict) else {}


def _check_model(model: dict[str, Any], normalizer: Any, path: Path) -> None:
    """Refuse tokenizers that are not plain byte-level BPE."""
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise TargetError(
            f"target gguf supports byte-level BPE tokenizers, {path} is {model.get('type')!r}: "
            "use --target native"
        )
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise TargetError(
            f"target gguf cannot express the normaliser {normalizer.get('type')!r} of {path}: "
            "use --target native"
        )
    affixes = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    for key in (*affixes, "ignore_merges", "dropout"):
        if model.get(key):
            raise TargetError(
                f"target gguf cannot express {key}={model[key]!r} of {path}: use --target native"
            )


def _pre_tokenizer_name(step: dict[str, Any] | None, path: Path) -> str:
    """llama.cpp's name of the pre-tokeniser."""
    steps = (step or {}).get("pretokenizers") or [step or {}]
    byte_level = steps[-1]
    if byte_level.get("type") == "ByteLevel" and not byte_level.get("add_prefix_space"):
        if len(steps) == 1 and byte_level.get("use_regex", True):
            return _BYTE_LEVEL_REGEX_NAME
        if len(steps) == 2 and not byte_level.get("use_regex", True):
            split = steps[0]
            regex = (split.get("pattern") or {}).get("Regex")
            is_plain = split.get("behavior") == "Isolated" and not split.get("invert")
            for name, known in _SPLIT_REGEXES.items():
                if regex == known and is_plain:
                    return name
    raise TargetError(
        f"target gguf does not know the pre-tokeniser of {path}; known are "
        f"{', '.join(_SPLIT_REGEXES)}: use --target native"
    )


def _token_type(token_id: int, names: dict[int, str], added: dict[int, dict[str, Any]]) -> int:
    if token_id not in names:
        return _UNUSED
    if token_id not in added:
        return _NORMAL
    return _CONTROL if added[token_id].get("special") else _USER_DEFINED


def _special_ids(
    tokenizer_config: dict[str, Any], config: dict[str, Any], ids: dict[str, int], vocab_size: int
) -> dict[str, int]:
    """Tokens named in tokenizer_config.json come first, then the ids in config.json."""
    special_ids = {}
    for kind in ("bos", "eos", "unk", "sep", "pad"):
        token = tokenizer_config.get(f"{kind}_token")
        content = token.get("content") if isinstance(token, dict) else token
        token_id: Any = ids.get(content) if isinstance(content, str) else None
        if token_id is None:
            token_id = config.get(f"{kind}_token_id")
        if isinstance(token_id, list):
            token_id = token_id[0] if token_id else None
        if isinstance(token_id, int) and 0 <= token_id < vocab_size:
            special_ids[kind] = token_id
    return special_ids


def _added_around(post_processor: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether the tokenizer puts a special token (before, after) a text."""
    processors = (post_processor or {}).get("processors") or [post_processor or {}]
    for processor in processors:
        if processor.get("type") == "TemplateProcessing":
            single = processor.get("single") or [{}]
            return "SpecialToken" in single[0], "SpecialToken" in single[-1]
    return False, False


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The template as transformers finds it: its own file, or a key of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
