"""The small files beside the weights: copied byte for byte, config.json patched as text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from edge_moe.config_reader import TEXT_CONFIG
from edge_moe.errors import CheckpointError, TargetError
from edge_moe.files import atomic_path
from edge_moe.spec import ModelSpec

CARD_NAME = "README.md"
_SUFFIXES = {".json", ".txt", ".jinja", ".model", ".tiktoken", ".py"}
_LEGAL_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY", "USAGE_POLICY")
_INDEX_SUFFIX = ".index.json"
_ROPE = "rope_parameters"
_OLDER_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")
"""Members of `rope_parameters` that transformers 4 keeps beside `rope_scaling`, not in it."""
_TEMPLATE_FOLDER = "additional_chat_templates"


def sidecar_files(source: Path) -> list[Path]:
    """Tokenizer, templates, configs and legal texts of a checkpoint folder, relative to it.

    Weights, their indexes and the source's own model card are not among them.
    """
    names = [path for path in sorted(source.iterdir()) if path.is_file() and _is_sidecar(path)]
    names += sorted((source / _TEMPLATE_FOLDER).glob("*.jinja"))
    return [path.relative_to(source) for path in names]


def sidecar_bytes(source: Path) -> int:
    """Size of all of them."""
    return sum((source / name).stat().st_size for name in sidecar_files(source))


def copy_sidecar(source: Path, folder: Path) -> None:
    """Copy them to `folder` byte for byte."""
    for name in sidecar_files(source):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        with atomic_path(target) as temporary:
            shutil.copyfile(source / name, temporary)


def _is_sidecar(path: Path) -> bool:
    if path.name.startswith(".") or path.name.endswith(_INDEX_SUFFIX):
        return False
    return path.suffix in _SUFFIXES or path.name.upper().startswith(_LEGAL_NAMES)


def patch_expert_count(text: str, spec: ModelSpec, num_experts: int) -> str:
    """config.json with another number of routed experts; every other byte stays.

    Every count key of the family that is present is changed. transformers 5 saves some families
    under a new key only (`num_local_experts` for `num_experts`) that other programs do not know, so
    the family's original key is added in front of it where it is missing.

    Raises:
        CheckpointError: no count key is found.
    """
    return _inside(text, spec, lambda inner: _with_expert_count(inner, spec, num_experts))


def _inside(text: str, spec: ModelSpec, change: Callable[[str], str]) -> str:
    """config.json with the object that holds the language model's values changed."""
    if not spec.is_nested:
        return change(text)
    start, end = _top_level_values(text)[TEXT_CONFIG]
    return text[:start] + change(text[start:end]) + text[end:]


def _with_expert_count(text: str, spec: ModelSpec, num_experts: int) -> str:
    spans = _top_level_values(text)
    present = [key for key in spec.family.num_experts_keys if key in spans]
    if not present:
        raise CheckpointError(
            f"config.json holds none of the keys {', '.join(spec.family.num_experts_keys)}"
        )
    original = spec.family.num_experts_keys[0]
    for key in sorted(present, key=lambda name: spans[name], reverse=True):  # last one first
        start, end = spans[key]
        text = f"{text[:start]}{num_experts}{text[end:]}"
    if original in present:
        return text
    return _insert_before(text, present[0], f'"{original}": {num_experts}')


def patch_expert_width(text: str, spec: ModelSpec, width: int) -> str:
    """config.json with another inner width of the routed experts; every other byte stays.

    DeepSeek-V3 states its shared expert's width as n_shared_experts of them, so that count changes
    too and the shared expert stays as wide as it is.

    Raises:
        CheckpointError: no width key is found.
        TargetError: the shared expert's width is no multiple of `width`.
    """
    return _inside(text, spec, lambda inner: _with_expert_width(inner, spec, width))


def _with_expert_width(text: str, spec: ModelSpec, width: int) -> str:
    spans = _top_level_values(text)
    present = [key for key in spec.family.expert_width_keys if key in spans]
    if not present:
        raise CheckpointError(
            f"config.json holds none of the keys {', '.join(spec.family.expert_width_keys)}"
        )
    values = {present[0]: width}
    if spec.family.shared_count_key in spans and spec.num_shared_experts:
        shared_width = spec.num_shared_experts * spec.expert_width
        if shared_width % width:
            raise TargetError(
                f"cannot narrow experts to {width}: config.json states the shared expert's width, "
                f"{shared_width}, as a multiple of theirs: use a divisor of {shared_width}"
            )
        values[spec.family.shared_count_key] = shared_width // width
    for key in sorted(values, key=lambda name: spans[name], reverse=True):  # last one first
        start, end = spans[key]
        text = f"{text[:start]}{values[key]}{text[end:]}"
    return text


def add_older_rope_keys(text: str, spec: ModelSpec) -> str:
    """config.json with the rotary values also under the keys of transformers 4, where they are not.

    transformers 5 saves `rope_parameters` alone. Version 4 and other programs that read
    `rope_theta` by name then take a default in its place, without a word.
    """
    return _inside(text, spec, _with_older_rope_keys)


def _with_older_rope_keys(text: str) -> str:
    spans = _top_level_values(text)
    if _ROPE not in spans:
        return text
    start, end = spans[_ROPE]
    values = json.loads(text[start:end])
    if not isinstance(values, dict) or "rope_theta" not in values:  # one per kind of layer
        return text
    moved = {key: values[key] for key in _OLDER_ROPE_KEYS if key in values}
    if values.get("rope_type", "default") != "default":
        rest = {key: value for key, value in values.items() if key not in moved}
        moved["rope_scaling"] = rest
    for key, value in moved.items():
        if key not in spans:
            text = _insert_before(text, _ROPE, f'"{key}": {json.dumps(value)}')
    return text


def _insert_before(text: str, key: str, member: str) -> str:
    """Put `member` before top-level `key`, on a line of its own when `key` has one."""
    start = text.rindex(f'"{key}"', 0, _top_level_values(text)[key][0])
    before = text[:start]
    blank = before[len(before.rstrip()) :]
    return f"{before}{member},{blank or ' '}{text[start:]}"


def _top_level_values(text: str) -> dict[str, tuple[int, int]]:
    """Where the value of each member of the JSON object `text` lies: key -> (start, end)."""
    decoder = json.JSONDecoder()
    spans: dict[str, tuple[int, int]] = {}
    position = _skip(text, text.index("{") + 1)
    while text[position] != "}":
        key, position = decoder.raw_decode(text, position)
        start = _skip(text, position)
        _, end = decoder.raw_decode(text, start)
        spans[key] = (start, end)
        position = _skip(text, end)
    return spans


def _skip(text: str, position: int) -> int:
    """First position from `position` on that is neither white space, comma nor colon."""
    match = re.compile(r"[\s,:]*").match(text, position)
    return match.end() if match else position
