"""The built wheel works on its own: installed, from elsewhere, beside a hostile `profiles/`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("edge_moe", "converters", "optimum", "profiles", "runtime")
FILES = ("pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Output of `command`, which must succeed; nothing of this checkout is on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=source)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh environment that holds the wheel; dependencies come from this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site_packages = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A working directory with packages of the names that the wheel could trip over."""
    for name in ("converters", "profiles", "runtime"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    return tmp_path


def test_wheel_holds_one_top_level_package_and_every_file(wheel: Path) -> None:
    """And one module in optimum's namespace, which has no __init__.py."""
    names = set(zipfile.ZipFile(wheel).namelist())
    others = {name for name in names if name.split("/")[0] != "edge_moe"}
    foreign = {name for name in others if not name.split("/")[0].endswith(".dist-info")}
    assert foreign == {"optimum/commands/register/register_edge_moe.py"}
    for name in SOURCES:
        if name == "optimum":
            continue
        for path in (ROOT / name).rglob("*"):
            parts = path.relative_to(ROOT).parts
            if not path.is_file() or "__pycache__" in parts or parts[1] in SOURCES:
                continue
            expected = "/".join(parts if name == "edge_moe" else ("edge_moe", *parts))
            assert expected in names, f"the wheel lacks {expected}"


def test_console_script_and_module_run_from_a_hostile_folder(
    installed: Path, hostile: Path
) -> None:
    assert "inspect" in run(installed / "edge-moe", "--help", cwd=hostile)
    assert "inspect" in run(installed / "python", "-m", "edge_moe", "--help", cwd=hostile)
    where = "import edge_moe.runtime as found; print(found.__file__)"
    assert str(installed.parent) in run(installed / "python", "-c", where, cwd=hostile)


def test_embedded_model_and_profiles_are_shipped(installed: Path, hostile: Path) -> None:
    find = "from edge_moe.demo import demo_model_dir; print(demo_model_dir())"
    model = run(installed / "python", "-c", find, cwd=hostile).strip()
    assert str(installed.parent) in model
    assert '"model_type": "qwen3_moe"' in run(
        installed / "edge-moe", "inspect", model, "--json", cwd=hostile
    )
    devices = "from edge_moe.profiles import device_names; print(device_names())"
    assert "h200" in run(installed / "python", "-c", devices, cwd=hostile)
