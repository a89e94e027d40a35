"""What `edge-moe run` opens: a session that pages experts, a .gguf file, or an ONNX folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_moe.commands.options import skip_rule, stderr
from edge_moe.commands.task_choice import AUTO, known_patterns
from edge_moe.errors import InputError, TargetError
from edge_moe.onnx_folder import is_onnx_folder
from edge_moe.open_model import is_gguf_file
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.commands.generation import Runnable
    from edge_moe.runtime.fetch_choice import Misses
    from edge_moe.runtime.gguf_session import GgufSession
    from edge_moe.runtime.kernel_choice import Kernels
    from edge_moe.runtime.linear_map import LinearMap
    from edge_moe.runtime.onnx_session import OnnxSession
    from edge_moe.runtime.pre_gate import PreGate
    from edge_moe.runtime.session import Session
    from edge_moe.runtime.stalls import StallOptions
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

    slots: int | None = None
    ram_bytes: int | None = None
    task: str | None = None
    patterns: Path | None = None
    skip: str | None = None
    skip_calibration: Path | None = None
    trace: Path | None = None
    prefetch: bool | None = None
    kernels: Kernels | None = None
    predictors: tuple[str, ...] = ()
    linear_map: Path | None = None
    misses: Misses | None = None
    gpu_layers: int | None = None
    rearranged: bool | None = None
    stall: StallOptions | None = None
    graphs: bool | None = None
    pre_gate: Path | None = None
    delta: Path | None = None

    def refuse(self, path: Path, runs: str, names: tuple[str, ...]) -> None:
        """Raise `TargetError` where one of the options `names` was given.

        `runs` says what runs `path`, and why it has nothing for them.
        """
        values = {
            "--slots": self.slots,
            "--ram": self.ram_bytes,
            "--task": self.task,
            "--patterns": self.patterns,
            "--skip": self.skip,
            "--skip-calibration": self.skip_calibration,
            "--trace": self.trace,
            "--kernels": self.kernels,
            "--predictor": self.predictors or None,
            "--linear-map": self.linear_map,
            "--misses": self.misses,
            "--gpu-layers": self.gpu_layers,
            "--rearranged": self.rearranged or None,
            "--stall": self.stall,
            "--graphs": self.graphs,
            "--pre-gate": self.pre_gate,
        }
        if self.delta is not None:
            from edge_moe.delta_file import refuse_delta

            refuse_delta(path, runs.partition(",")[0], self.delta)
        given = [name for name in names if values[name] is not None]
        if given:
            raise TargetError(
                f"{path} runs in {runs}: leave out {', '.join(given)}, or build with --target "
                "native"
            )

    def refuse_idle(self) -> None:
        """Raise InputError where what reads ahead was asked for beside something that never asks.

        A linear map may still be traced.
        """
        if self.pre_gate is not None and (self.predictors or self.linear_map is not None):
            raise InputError(
                "--pre-gate has decided what --predictor and --linear-map would guess: leave out "
                "one or the other"
            )
        if self.stall is None or not self.stall.uses_shadows:
            return
        values = {
            "--prefetch": self.prefetch,
            "--predictor": self.predictors,
            "--linear-map": self.linear_map is not None and self.trace is None,
        }
        given = [name for name, value in values.items() if value]
        if given:
            raise InputError(
                f"--stall {self.stall.mode} reads nothing ahead, but brings in what was missed: "
                f"leave out {', '.join(given)}, or use --stall exact"
            )


_LLAMA = ("--gpu-layers", "--rearranged")
_ROUTING = (
    "--ram",
    "--task",
    "--patterns",
    "--skip",
    "--skip-calibration",
    "--kernels",
    "--misses",
    "--stall",
    "--graphs",
    "--pre-gate",
)


def runnable_path(model: str, revision: str | None) -> Path:
    """The folder or .gguf file that MODEL names."""
    from edge_moe.hub import gguf_inside, resolve_model

    return gguf_inside(Path(model).expanduser()) or resolve_model(model, revision)


def _require_one_limit(common: CommonOptions, slots: int | None) -> None:
    """Raise InputError where `slots` are given beside a budget, before the work begins."""
    from edge_moe.runtime.allotment import require_one_limit

    require_one_limit(common.budget_bytes, slots)


def open_runnable(
    path: Path, common: CommonOptions, paging: PagingOptions
) -> tuple[Runnable, dict[str, TaskPattern]]:
    """The model in `path`, and its task patterns by name where a task was asked for.

    Raises:
        InputError: options that contradict each other.
        TargetError: options that what runs it has nothing for.
    """
    _require_one_limit(common, paging.slots)
    if is_gguf_file(path):
        return _open_gguf(path, common, paging, can_trace=paging.trace is not None), {}
    if is_onnx_folder(path):
        return _open_onnx(path, common, paging), {}
    return _open_native(path, common, paging)


def _open_native(
    path: Path, common: CommonOptions, paging: PagingOptions
) -> tuple[Runnable, dict[str, TaskPattern]]:
    if paging.gpu_layers is not None:
        raise TargetError(
            f"{path} runs in edge-moe's own runtime: --gpu-layers is for .gguf files; leave it out "
            "and give --device cuda"
        )
    paging.refuse_idle()
    known = known_patterns(path, paging.task, paging.patterns)
    from edge_moe.runtime.predictor_choice import default_predictors
    from edge_moe.runtime.session import Session
    from edge_moe.runtime.stalls import EXACT

    linear = load_linear(paging.linear_map)
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
        kernels=paging.kernels or "auto",
        predictors=paging.predictors or default_predictors(has_linear=linear is not None),
        linear=linear,
        misses=paging.misses or "auto",
        stall=paging.stall or EXACT,
        graphs=paging.graphs,
        pre_gate=load_pre_gate(paging.pre_gate),
        delta=paging.delta,
        rearranged=bool(paging.rearranged),
    )
    return session, known


def _open_onnx(path: Path, common: CommonOptions, paging: PagingOptions) -> OnnxSession:
    runs = "onnxruntime, which neither pages nor skips experts"
    guessing = ("--predictor", "--linear-map")
    paging.refuse(path, runs, ("--slots", "--trace", *guessing, *_LLAMA, *_ROUTING))
    from edge_moe.runtime.onnx_session import OnnxSession

    return OnnxSession.open(
        path,
        context_tokens=common.context_tokens,
        device=common.device,
        budget_bytes=common.budget_bytes,
    )


def _open_gguf(
    path: Path, common: CommonOptions, paging: PagingOptions, *, can_trace: bool
) -> GgufSession:
    paging.refuse(
        path, "llama.cpp, for which edge-moe pages experts and no more", ("--linear-map", *_ROUTING)
    )
    if common.device == "cuda":
        raise TargetError(
            f"{path} runs in llama.cpp with its experts on the CPU: leave out --device cuda and "
            "give --gpu-layers, or build with --target native"
        )
    from edge_moe.runtime.gguf_session import GgufSession
    from edge_moe.runtime.predictor_choice import DEFAULT_PREDICTORS

    with _rearranging(is_asked=bool(paging.rearranged)) as (folder, on_bytes):
        return GgufSession.open(
            path,
            budget_bytes=common.budget_bytes,
            context_tokens=common.context_tokens,
            num_slots=paging.slots,
            prefetch=paging.prefetch,
            can_trace=can_trace,
            gpu_layers=paging.gpu_layers or 0,
            predictors=paging.predictors or DEFAULT_PREDICTORS,
            rearranged=folder,
            on_bytes=on_bytes,
        )


@contextmanager
def _rearranging(*, is_asked: bool) -> Iterator[tuple[Path | None, Callable[[int, int], None]]]:
    """Where rearranged experts are kept, and a bar that begins when they are made."""
    if not is_asked:
        yield None, lambda *_: None
        return
    from edge_moe.converters.progress import progress_bar
    from edge_moe.runtime.rearranged_file import default_folder

    folder = default_folder()
    with progress_bar() as bar:
        tasks: list[Any] = []

        def show(done_bytes: int, total_bytes: int) -> None:
            if not tasks:
                text = f"rearranging {format_bytes(total_bytes)} of experts into {folder}"
                stderr().print(text)
                tasks.append(bar.add_task("rearranging", total=total_bytes))
            bar.update(tasks[0], completed=done_bytes)

        yield folder, show


def load_linear(path: Path | None) -> LinearMap | None:
    """The map that --linear-map names."""
    if path is None:
        return None
    from edge_moe.runtime.linear_map import LinearMap

    return LinearMap.load(path)


def load_pre_gate(path: Path | None) -> PreGate | None:
    """The pre-gate that --pre-gate names."""
    if path is None:
        return None
    from edge_moe.runtime.pre_gate import PreGate

    return PreGate.load(path)


def open_traceable(
    path: Path, common: CommonOptions, slots: int | None, linear_map: Path | None = None
) -> Session | GgufSession:
    """The model in `path`, whose routers can be watched, and what `linear_map` guesses of them.

    Raises:
        InputError: slots beside a budget.
        TargetError: an ONNX folder.
    """
    _require_one_limit(common, slots)
    if is_onnx_folder(path):
        raise TargetError(
            f"{path} runs in onnxruntime, which tells nobody what its routers choose: give the "
            "checkpoint that it was made from"
        )
    if is_gguf_file(path):
        paging = PagingOptions(slots, prefetch=False, linear_map=linear_map)
        return _open_gguf(path, common, paging, can_trace=True)
    from edge_moe.runtime.session import Session

    return Session.open(
        path,
        budget_bytes=common.budget_bytes,
        context_tokens=common.context_tokens,
        device=common.device,
        num_slots=slots,
        prefetch=False,
        linear=load_linear(linear_map),
    )


@contextmanager
def tracing(session: Session | GgufSession, path: Path) -> Iterator[None]:
    """Write the routers' choices to `path` when the block ends, however it ends."""
    with session.tracing() as recorder:
        try:
            yield
        finally:
            recorder.finish(session.trace_info()).save(path)
