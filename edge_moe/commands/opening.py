"""What `edge-moe run` opens: a session that pages experts, or an ONNX folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.commands.options import skip_rule
from edge_moe.commands.task_choice import AUTO, known_patterns
from edge_moe.errors import TargetError
from edge_moe.onnx_folder import is_onnx_folder

if TYPE_CHECKING:
    from edge_moe.commands.generation import Runnable
    from edge_moe.runtime.session import Session
    from edge_moe.task_pattern import TaskPattern


@dataclass(frozen=True)
class CommonOptions:
    """Options of every runtime."""

    budget_bytes: int | None
    context_tokens: int | None
    device: str | None


@dataclass(frozen=True)
class PagingOptions:
    """Options of edge-moe's own runtime, which onnxruntime has nothing for."""

    slots: int | None
    ram_bytes: int | None
    task: str | None
    patterns: Path | None
    skip: str | None
    skip_calibration: Path | None
    trace: Path | None
    prefetch: bool

    def refuse(self, path: Path) -> None:
        """Raise `TargetError` where one was given for the ONNX folder `path`."""
        values = {
            "--slots": self.slots,
            "--ram": self.ram_bytes,
            "--task": self.task,
            "--patterns": self.patterns,
            "--skip": self.skip,
            "--skip-calibration": self.skip_calibration,
            "--trace": self.trace,
        }
        given = [name for name, value in values.items() if value is not None]
        if given:
            raise TargetError(
                f"{path} runs in onnxruntime, which neither pages nor skips experts: leave out "
                f"{', '.join(given)}, or build with --target native"
            )


def runnable_path(model: str, revision: str | None) -> Path:
    """The folder that MODEL names.

    Raises:
        TargetError: it is a GGUF file, which llama.cpp runs.
    """
    from edge_moe.hub import gguf_inside, resolve_model

    path = gguf_inside(Path(model).expanduser()) or resolve_model(model, revision)
    if path.suffix.lower() == ".gguf":
        raise TargetError(
            f"run cannot load {path}: it runs native packages, Hugging Face and ONNX folders; for "
            f"GGUF use llama.cpp, as in `llama-cli -m {path}`, or build with --target native"
        )
    return path


def open_runnable(
    path: Path, common: CommonOptions, paging: PagingOptions
) -> tuple[Runnable, dict[str, TaskPattern]]:
    """The model in `path`, and its task patterns by name where a task was asked for.

    Raises:
        TargetError: an ONNX folder, and options for paging.
    """
    if is_onnx_folder(path):
        paging.refuse(path)
        from edge_moe.runtime.onnx_session import OnnxSession

        onnx = OnnxSession.open(
            path,
            context_tokens=common.context_tokens,
            device=common.device,
            budget_bytes=common.budget_bytes,
        )
        return onnx, {}
    known = known_patterns(path, paging.task, paging.patterns)
    from edge_moe.runtime.session import Session

    session = Session.open(
        path,
        budget_bytes=common.budget_bytes,
        context_tokens=common.context_tokens,
        device=common.device,
        num_slots=paging.slots,
        prefetch=paging.prefetch,
        ram_bytes=paging.ram_bytes,
        skip=skip_rule(paging.skip, paging.skip_calibration, path),
        pattern=known.get(paging.task) if paging.task else None,
        match_first=paging.task == AUTO,
    )
    return session, known


@contextmanager
def tracing(session: Session, path: Path) -> Iterator[None]:
    """Write the routers' choices to `path` when the block ends, however it ends."""
    with session.tracing() as recorder:
        try:
            yield
        finally:
            recorder.finish(session.trace_info()).save(path)
