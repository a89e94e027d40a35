"""Where a GGUF file comes from: the `general.*` keys for people and for model hubs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edge_moe import __version__
from edge_moe.converters.model_card import base_model, carried_front_matter
from edge_moe.plan import Plan

_HUB = "https://huggingface.co"


def add_provenance(writer: Any, plan: Plan, folder: Path) -> None:
    """What the plan and the model card in `folder` state, and nothing guessed."""
    base = base_model(plan.model, folder)
    writer.add_type("model")
    writer.add_name(folder.name)
    writer.add_quantized_by("edge-moe")
    writer.add_string("edge_moe.version", __version__)
    writer.add_string("edge_moe.source_fingerprint", plan.model_fingerprint)
    card = _card(folder)
    for key in ("license", "license_name", "license_link"):
        if card.get(key):
            getattr(writer, f"add_{key}")(card[key][0])
    if card.get("language"):
        writer.add_languages(card["language"])
    _add_base_model(writer, base)


def _add_base_model(writer: Any, base: str) -> None:
    owner, slash, name = base.rpartition("/")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, name)
    if not slash:
        return
    writer.add_base_model_organization(0, owner)
    writer.add_base_model_repo_url(0, f"{_HUB}/{base}")
    writer.add_source_url(f"{_HUB}/{base}")
    writer.add_source_repo_url(f"{_HUB}/{base}")


def _card(folder: Path) -> dict[str, list[str]]:
    """Single values and lists of the card's front matter, as strings.

    Only the plain forms `key: value`, `key: [a, b]` and a list of `- a` lines are read.
    """
    found: dict[str, list[str]] = {}
    text = carried_front_matter(folder / "README.md")
    for key, rest in re.findall(r"^([\w-]+):(.*\n(?:[ \t-].*\n|\n)*)", text, re.MULTILINE):
        first, _, lines = rest.partition("\n")
        items = re.findall(r"^\s*-\s*(.+?)\s*$", lines, re.MULTILINE)
        if first.strip():
            inner = re.fullmatch(r"\s*\[(.*)\]\s*", first)
            items = inner.group(1).split(",") if inner else [first]
        found[key] = [_unquoted(item.strip()) for item in items if item.strip()]
    return found


def _unquoted(value: str) -> str:
    if value[:1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value.strip("'")
