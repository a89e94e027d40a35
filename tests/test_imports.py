"""Imports point one way, and the light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "triton", "llama_cpp")
FRONT = ("edge_moe.commands", "edge_moe.cli")
LINKED = ("converters", "profiles", "runtime")

# layer -> what it must not import, anywhere
FORBIDDEN = {
    "core": ("edge_moe.converters", "edge_moe.runtime", *FRONT, *HEAVY),
    "profiles": ("edge_moe.converters", "edge_moe.runtime", *FRONT, *HEAVY),
    "runtime": ("edge_moe.converters", *FRONT),
    "converters": FRONT,
    "demo": FRONT,
}
# layer -> what it may import only inside a function
LATE = {"commands": ("edge_moe.converters", "edge_moe.runtime", "edge_moe.demo", *HEAVY)}


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] != "edge_moe":
        return parts[0]
    if parts[1] in ("commands", "demo"):
        return parts[1]
    return "commands" if parts[1] in ("cli.py", "start.py", "__main__.py") else "core"


def source_files() -> list[Path]:
    paths = [path for top in LINKED for path in (ROOT / top).rglob("*.py")]
    for path in (ROOT / "edge_moe").rglob("*.py"):
        if path.relative_to(ROOT).parts[1] not in LINKED:
            paths.append(path)
    return sorted(paths)


def imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_level(tree: ast.Module) -> ast.Module:
    """The statements that run on import: no function bodies, no TYPE_CHECKING blocks."""
    kept = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(body=kept, type_ignores=[])


def is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    layer = layer_of(path)
    for name in imported_names(tree):
        assert name.split(".")[0] not in LINKED, f"{path} imports {name}: say edge_moe.{name}"
        for prefix in FORBIDDEN.get(layer, ()):
            assert not is_under(name, prefix), f"{path} ({layer}) imports {name}"
    for name in imported_names(module_level(tree)):
        for prefix in LATE.get(layer, ()):
            assert not is_under(name, prefix), f"{path} imports {name} outside a function"


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["inspect", "DEMO"]])
def test_light_commands_import_nothing_heavy(arguments: list[str], demo_model: Path) -> None:
    arguments = [str(demo_model) if argument == "DEMO" else argument for argument in arguments]
    assert run_light(*arguments) == 0


def test_finished_statistics_are_refused_before_anything_heavy(
    demo_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "stats.json").touch()
    assert run_light("calibrate", str(demo_model), "--task", "code", "-o", str(tmp_path)) == 2


def run_light(*arguments: str) -> int:
    """The exit code of a command line that must import nothing heavy."""
    code = (
        "import sys; from edge_moe.cli import run; code = run(sys.argv[1:]);"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    return done.returncode
