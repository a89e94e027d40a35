"""The MODEL argument: a local folder, a .gguf file, or the id of a repository on a model hub."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import InputError
from edge_moe.gguf_split import is_gguf_name, is_later_part
from edge_moe.tensor_info import TensorInfo

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SNAPSHOT_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", "README.md"]
_SNAPSHOT_IGNORED = ["*/*", "consolidated*"]
"""Subfolders and second copies of the weights in another layout."""


def is_hub_id(model: str) -> bool:
    """Whether `model` can only mean `owner/name` on a hub: no such local path, no local parent."""
    if Path(model).exists() or not _HUB_ID.fullmatch(model) or is_gguf_name(Path(model)):
        return False
    return not Path(model).parent.exists()


def local_path(model: str) -> Path:
    """`model` as an existing local folder or file.

    Raises:
        InputError: it does not exist, or is the folder of one or several GGUF files.
    """
    path = Path(model).expanduser()
    if not path.exists():
        raise InputError(
            f"model {model!r} does not exist: give a checkpoint folder, a package, a .gguf file "
            "or a hub id such as Qwen/Qwen3-30B-A3B"
        )
    inside = gguf_inside(path)
    if inside is not None:
        raise InputError(
            f"model {model!r} is a folder around a GGUF file: inspect, calibrate, plan, build, "
            f"eval and run read {inside} itself, other commands need the checkpoint or a build "
            "with --target native"
        )
    if path.is_file() and not is_gguf_name(path):
        raise InputError(
            f"model {model!r} is a file: MODEL must be a checkpoint folder, a package folder or a "
            ".gguf file"
        )
    return path


def gguf_inside(folder: Path) -> Path | None:
    """The GGUF model in `folder`, which holds no checkpoint; of a split one the first part.

    Raises:
        InputError: there are several.
    """
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    found = sorted(path for path in folder.glob("*.gguf") if not is_later_part(path))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(
            f"model {str(folder)!r} is a folder of several GGUF models, {names}: give one of these "
            "files"
        )
    return found[0] if found else None


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The local folder or file that `model` names; a hub id is downloaded into the hub's cache.

    Raises:
        InputError: no such path, or the hub does not deliver it.
    """
    if not is_hub_id(model):
        return local_path(model)
    from huggingface_hub import snapshot_download

    with _hub_errors(model, revision):
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=_SNAPSHOT_PATTERNS,
            ignore_patterns=_SNAPSHOT_IGNORED,
        )
    return Path(folder)


def remote_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Headers of a checkpoint on the hub, by ranged reads: tensors are known, but not readable.

    Raises:
        InputError: the hub does not deliver config.json or the headers.
        SpecError, CheckpointError: as for a local folder.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    with _hub_errors(model, revision):
        config = Path(hf_hub_download(model, "config.json", revision=revision))
        metadata = get_safetensors_metadata(model, revision=revision)
    tensors: dict[str, TensorInfo] = {}
    for name, file in metadata.files_metadata.items():
        tensors.update(_tensor_infos(config.parent / name, file))
    return Checkpoint(config.parent, tensors)


def _tensor_infos(path: Path, file: Any) -> dict[str, TensorInfo]:
    """`file` is huggingface_hub's SafetensorsFileMetadata.

    `offset` counts from the end of the header, whose length the hub's answer leaves out.
    """
    return {
        name: TensorInfo(
            name=name,
            path=path,
            dtype=info.dtype,
            shape=tuple(info.shape),
            offset=info.data_offsets[0],
            num_bytes=info.data_offsets[1] - info.data_offsets[0],
        )
        for name, info in file.tensors.items()
    }


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the hub client raises into one line; progress bars only for a person."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    name = f"{model}@{revision}" if revision else model
    try:
        yield
    except Exception as error:  # the client passes on the exceptions of its HTTP library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model {name!r} is no local path and the hub does not deliver it ({reason}): check "
            "the name and the network, log in with `hf auth login` if it is gated, or download it "
            "elsewhere and give the folder"
        ) from None
