"""tokenizer.json -> what llama.cpp's tokenizers read from GGUF metadata.

Three kinds are written: byte-level BPE (`gpt2`), a SentencePiece model that became BPE (`llama`),
and BPE over spaces written as U+2581 (`gemma4`). Whatever llama.cpp would split differently is
refused. One difference remains: llama.cpp does not apply the NFC normaliser of Qwen tokenizers, so
text in decomposed Unicode gets other ids there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edge_moe.converters.gguf_splitting import find_splitting, is_reached_by_merges
from edge_moe.errors import TargetError

Kind = Literal["gpt2", "llama", "gemma4"]

_SPACE = "\u2581"
_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_SPACE_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}

# gguf.TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class GgufVocabulary:
    """Token list and special ids; V entries, one per row of the embedding."""

    kind: Kind
    """`tokenizer.ggml.model`."""
    pre_tokenizer: str | None
    """`tokenizer.ggml.pre`."""
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    """`left right` in order of rank; none in a SentencePiece model."""
    scores: list[float] | None
    """Of a SentencePiece model: the highest is merged first."""
    prefixes_space: bool | None
    """Whether a text starts with a space more; None where its kind says so."""
    special_ids: dict[str, int]
    """bos, eos, unk, sep, pad -> token id, where the tokenizer has one."""
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def read_vocabulary(folder: Path, vocab_size: int) -> GgufVocabulary:
    """The vocabulary of the checkpoint in `folder`, filled up to `vocab_size` with unused tokens.

    Raises:
        TargetError: no tokenizer.json, a damaged one, or one that llama.cpp cannot reproduce.
    """
    path = folder / "tokenizer.json"
    try:
        return _read_vocabulary(path, vocab_size)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise TargetError(
            f"target gguf: {path}, or a file beside it, is no tokenizer's "
            f"({type(error).__name__}: {error}): download it again"
        ) from None


def _read_vocabulary(path: Path, vocab_size: int) -> GgufVocabulary:
    folder = path.parent
    tokenizer = _read_json(path)
    if not tokenizer:
        raise TargetError(f"target gguf needs {path}: save the tokenizer as a fast one first")
    model = tokenizer.get("model") or {}
    _check_model(model, path)
    kind, prefixes_space = _kind(tokenizer, path)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
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
    if kind == "gemma4" and not bos:
        raise TargetError(
            "target gguf: llama.cpp starts every text with a BOS token where spaces are merged, "
            f"{path} does not: use --target native"
        )
    types = [_token_type(token_id, names, added, model) for token_id in range(vocab_size)]
    tokens = [names.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)]
    if not all(isinstance(token, str) for token in tokens):
        raise TypeError("a token is no text")
    plain = [token for token, kind_ in zip(tokens, types, strict=True) if kind_ == _NORMAL]
    scores = _scores(tokens, plain, merges, path) if kind == "llama" else None
    return GgufVocabulary(
        kind=kind,
        pre_tokenizer=_pre_tokenizer(tokenizer, plain, merges, path) if kind == "gpt2" else None,
        tokens=tokens,
        token_types=types,
        merges=[] if kind == "llama" else merges,
        scores=scores,
        prefixes_space=prefixes_space,
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


def _check_model(model: dict[str, Any], path: Path) -> None:
    """Refuse models that are no BPE, or one with affixes."""
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise TargetError(
            f"target gguf supports BPE tokenizers, {path} is {model.get('type')!r}: "
            "use --target native"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise TargetError(
                f"target gguf cannot express {key}={model[key]!r} of {path}: use --target native"
            )


def _kind(tokenizer: dict[str, Any], path: Path) -> tuple[Kind, bool | None]:
    """(kind, whether a space comes before the text): by what happens to spaces and bytes."""
    normalisers = _parts(tokenizer.get("normalizer"), "normalizers")
    step, model = tokenizer.get("pre_tokenizer"), tokenizer["model"]
    if not model.get("byte_fallback"):
        unknown = next((part for part in normalisers if part.get("type") != "NFC"), None)
        if unknown is None:
            return "gpt2", None
        raise TargetError(
            f"target gguf cannot express the normaliser {unknown.get('type')!r} of {path}: "
            "use --target native"
        )
    if model.get("ignore_merges"):
        raise TargetError(
            f"target gguf cannot express ignore_merges=True beside byte_fallback=True of {path}: "
            "use --target native"
        )
    if normalisers == [_TO_SPACE] and step in (None, _SPACE_SPLIT):
        return "gemma4", False
    if normalisers == [_PREPEND, _TO_SPACE] and step is None:
        return "llama", True
    step = step or {}
    scheme = step.get("prepend_scheme")
    is_metaspace = step.get("type") == "Metaspace" and not step.get("split", True)
    if not normalisers and is_metaspace and scheme in ("always", "never"):
        return "llama", scheme == "always"
    raise TargetError(
        f"target gguf cannot express how {path} writes spaces (byte_fallback=True, normaliser "
        f"{[part.get('type') for part in normalisers]}, pre-tokeniser {step.get('type')}, "
        f"prepend_scheme {scheme}): use --target native"
    )


def _parts(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step, or none."""
    if step is None:
        return []
    return list(step.get(key) or []) if step.get("type") == "Sequence" else [step]


def _pre_tokenizer(
    tokenizer: dict[str, Any], plain: Sequence[str], merges: Sequence[str], path: Path
) -> str:
    """llama.cpp's name of the pre-tokeniser."""
    ignores = bool(tokenizer["model"].get("ignore_merges"))
    found = find_splitting(tokenizer.get("pre_tokenizer"), ignores, path)
    if found.ignores_merges != ignores and not is_reached_by_merges(plain, merges):
        raise TargetError(
            f"target gguf cannot express ignore_merges={ignores} of {path}: llama.cpp's "
            f"{found.name} has ignore_merges={found.ignores_merges}, and merges do not reach every "
            "token: use --target native"
        )
    return found.name


def _scores(
    tokens: Sequence[str], plain: Sequence[str], merges: Sequence[str], path: Path
) -> list[float]:
    """Scores by which SentencePiece merges as these merges do: minus the rank of a token.

    Raises:
        TargetError: they are not a SentencePiece model's, which merges whatever gives a token.
    """
    ranks: dict[str, int] = {}
    last = ""
    for merge in merges:
        token = merge.replace(" ", "", 1)
        if token != last and token in ranks:
            raise TargetError(f"target gguf: the merges of {path} to {token!r} lie apart: {_SPM}")
        ranks.setdefault(token, len(ranks))
        last = token
    known, pairs = set(plain), set(merges)
    for token in plain:
        for cut in range(1, len(token)):
            if token[:cut] in known and token[cut:] in known:
                if f"{token[:cut]} {token[cut:]}" not in pairs:
                    raise TargetError(f"target gguf: {path} does not merge to {token!r}: {_SPM}")
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


_SPM = "they are not those of a SentencePiece model; use --target native"


def _token_type(
    token_id: int,
    names: dict[int, str],
    added: dict[int, dict[str, Any]],
    model: dict[str, Any],
) -> int:
    if token_id not in names:
        return _UNUSED
    if model.get("byte_fallback"):
        if names[token_id] == model.get("unk_token"):
            return _UNKNOWN
        if re.fullmatch("<0x[0-9A-F]{2}>", names[token_id]):
            return _BYTE
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
