"""The errors a user can meet. `cli.main` prints one line and exits with `exit_code`.

Every message names the thing, the value that was found, and the remedy.
"""

from __future__ import annotations


def install_command(extra: str) -> str:
    """How to get an extra: from the package index, and in a checkout."""
    return f"pip install 'edge-moe[{extra}]', or in a checkout pip install -e '.[{extra}]'"


class EdgeMoeError(Exception):
    """Base of every error that is the input's fault, not the program's."""

    exit_code = 2


class InputError(EdgeMoeError):
    """A path, an option or a text that cannot be used."""


class SpecError(EdgeMoeError):
    """A config.json whose architecture or values edge-moe does not understand."""


class CheckpointError(EdgeMoeError):
    """A checkpoint file that is missing, truncated, inconsistent or holds NaN."""


class FormError(EdgeMoeError):
    """A storage form that cannot hold the given tensor, or packed bytes that are not one."""


class StatsError(EdgeMoeError):
    """Calibration statistics that are damaged, or that belong to another model or run."""


class PlanError(EdgeMoeError):
    """A plan file that is damaged, or that does not belong to the model it is used with."""


class PackageError(EdgeMoeError):
    """A native package that is damaged or incomplete."""


class DeltaError(EdgeMoeError):
    """A task delta that is damaged, or that belongs to another model."""


class TargetError(EdgeMoeError):
    """Something the chosen target (native, gguf, hf, onnx) cannot express."""


class DiskSpaceError(EdgeMoeError):
    """Not enough free disk space for what is about to be written."""


class BudgetError(EdgeMoeError):
    """A memory budget that cannot be met. `minimum_bytes` is the smallest one that can."""

    exit_code = 3

    def __init__(self, message: str, minimum_bytes: int) -> None:
        super().__init__(message)
        self.minimum_bytes = minimum_bytes


class SolverError(EdgeMoeError):
    """An integer program for which no choice was found in its time."""


class MissingExtraError(EdgeMoeError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f"{install_command(extra)}"
        )
        self.package = package
        self.extra = extra
