"""The package list, the links and the package data agree with the tree."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("converters", "profiles", "runtime")
NAMESPACE = "optimum.commands.register"
"""A folder of optimum's, to which this project adds a module."""


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["tool"]["setuptools"]  # type: ignore[no-any-return]


def packages_in_tree() -> set[str]:
    """Every folder with Python files, under the name it is imported by."""
    found = set()
    for top in ("edge_moe", *LINKED):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.parent.relative_to(ROOT).parts
            if parts[0] == "edge_moe" and len(parts) > 1 and parts[1] in LINKED:
                continue  # the same files, through the link
            found.add(".".join(parts if parts[0] == "edge_moe" else ("edge_moe", *parts)))
    return found


def test_every_package_is_listed(settings: dict[str, Any]) -> None:
    assert set(settings["packages"]) == packages_in_tree() | {NAMESPACE}


def test_the_namespace_of_optimum_stays_one() -> None:
    folder = ROOT.joinpath(*NAMESPACE.split("."))
    assert [path.name for path in folder.glob("*.py")] == ["register_edge_moe.py"]
    assert not list((ROOT / "optimum").rglob("__init__.py"))


def test_package_dir_maps_the_linked_folders(settings: dict[str, Any]) -> None:
    expected = {
        name: "/".join(name.split(".")[1:])
        for name in packages_in_tree()
        if name.split(".")[1:2] and name.split(".")[1] in LINKED
    }
    assert settings["package-dir"] == expected


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_lead_to_the_folders(name: str) -> None:
    link = ROOT / "edge_moe" / name
    assert link.is_symlink(), f"{link} is not a link: git config core.symlinks true"
    assert str(link.readlink()) == f"../{name}"
    assert (link / "__init__.py").is_file()


def test_package_data_patterns_find_files(settings: dict[str, Any]) -> None:
    for package, patterns in settings["package-data"].items():
        folder = ROOT.joinpath(*package.split("."))
        for pattern in patterns:
            assert any(path.is_file() for path in folder.glob(pattern)), (package, pattern)


def test_every_data_file_is_shipped(settings: dict[str, Any]) -> None:
    data = settings["package-data"]
    for package in packages_in_tree():
        folder = ROOT.joinpath(*package.split("."))
        shipped = {path for pattern in data.get(package, []) for path in folder.glob(pattern)}
        for path in folder.iterdir():
            if path.is_file() and path.suffix != ".py":
                assert path in shipped, f"{path} is missing from package-data"
