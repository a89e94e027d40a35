"""A MoE learns from text beside the dense model that it is at first, whose predictions it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from edge_moe.converters.recover_teacher import Predictor, TeacherCache, cache_bytes
from edge_moe.converters.recover_text import TrainText
from edge_moe.converters.text_objective import TextObjective, TextStudent
from edge_moe.converters.window_training import (
    WindowSettings,
    WindowTraining,
    missing_state_bytes,
    windows_read,
)
from edge_moe.files import require_free_disk
from edge_moe.runtime.evaluate import progress

STATE_NAME = "training.safetensors"
_SAVE_SECONDS = 60.0


class Learner(TextStudent, Predictor, Protocol):
    """The MoE in training; `logits` are the dense model's as long as nothing was learned."""

    parameters: dict[str, Tensor]


def learn(
    student: Learner,
    text: TrainText,
    settings: WindowSettings,
    scratch: Path,
    title: str,
    *,
    is_compared: bool,
    output_bytes: int,
    log_path: Path | None = None,
) -> WindowTraining:
    """Train to the end; the student then holds the state that judged best.

    `scratch` keeps the state and the dense model's predictions, which are made only where the
    student `is_compared` with it; `output_bytes` are still written to the same disk afterwards.
    `title` names the progress bar; `log_path` as `WindowTraining` has it.

    Raises:
        DiskSpaceError: too little space for state, predictions and output, before the work begins.
        InputError: a damaged state.
        CheckpointError: the dense model computes no finite logits.
    """
    teacher = TeacherCache(scratch / "original") if is_compared else None
    missing = teacher.missing(windows_read(text, settings)) if teacher is not None else []
    num_tokens = sum(len(text.windows[index]) for index in missing)
    num_weights = sum(value.numel() for value in student.parameters.values())
    needed_bytes = cache_bytes(num_tokens) + max(0, output_bytes)
    needed_bytes += missing_state_bytes(scratch / STATE_NAME, num_weights, settings.steps)
    require_free_disk(scratch, needed_bytes, "the training, and what it writes,")
    if teacher is not None:
        with progress("the dense model predicts", len(missing)) as advance:
            teacher.fill(student, text.windows, advance, missing)  # nothing is learned yet
    objective = TextObjective(student, text, teacher)
    training = WindowTraining(
        student.parameters, objective, text, settings, scratch / STATE_NAME, log_path
    )
    with progress(title, settings.steps - training.step) as advance:
        training.run(advance, save_seconds=_SAVE_SECONDS)
    return training
