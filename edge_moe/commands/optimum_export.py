"""`optimum-cli export edge-moe`: `edge-moe build` for those who start at Hugging Face optimum.

Imported by optimum alone, which finds it through its namespace `optimum.commands.register`. The
options are read off `edge-moe build`, so that both always take the same ones.
"""

from __future__ import annotations

import inspect
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args, get_type_hints

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from typer.models import OptionInfo

from edge_moe.commands.build import build_command


class EdgeMoeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Runs `edge-moe build` with the arguments that were given."""

    COMMAND = CommandInfo(
        name="edge-moe",
        help="Shrink a Mixture-of-Experts model as an edge-moe plan says: native, Hugging Face, "
        "GGUF or ONNX.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Give `parser` the arguments of `edge-moe build`."""
        for parameter in build_parameters():
            parameter.add_to(parser)

    def run(self) -> None:
        """Build, and leave with the exit code of `edge-moe build` where it failed."""
        from edge_moe.cli import prepare_environment, run

        for warning in companion_warnings():
            print(f"warning: {warning}", file=sys.stderr)
        prepare_environment()
        code = run(command_line(self.args))
        if code:
            sys.exit(code)


@dataclass(frozen=True)
class Parameter:
    """One argument of `edge-moe build`."""

    dest: str
    names: tuple[str, ...]
    """Option strings, the long one first; none for a positional argument."""
    help: str
    kind: type
    is_required: bool

    def add_to(self, parser: ArgumentParser) -> None:
        """The same argument in argparse's words."""
        text = self.help.replace("%", "%%")
        if not self.names:
            parser.add_argument(self.dest, metavar=self.dest.upper(), help=text)
        elif self.kind is bool:
            parser.add_argument(*self.names, dest=self.dest, action="store_true", help=text)
        else:
            choices = [each.value for each in self.kind] if issubclass(self.kind, Enum) else None
            parser.add_argument(
                *self.names, dest=self.dest, required=self.is_required, choices=choices, help=text
            )


def build_parameters() -> list[Parameter]:
    """The arguments of `edge-moe build`, read off its signature."""
    hints = get_type_hints(build_command, include_extras=True)
    return [
        _parameter(name, hints[name], each.default)
        for name, each in inspect.signature(build_command).parameters.items()
    ]


def command_line(arguments: Namespace) -> list[str]:
    """The arguments of `edge-moe` that say the same as optimum's."""
    words = ["build"]
    for parameter in build_parameters():
        value = getattr(arguments, parameter.dest)
        if value is None or value is False:
            continue
        if not parameter.names:
            words.append(str(value))
        elif value is True:
            words.append(parameter.names[0])
        else:
            words.append(f"{parameter.names[0]}={value}")
    return words


def companion_warnings() -> list[str]:
    """What to know about other optimum packages that are installed."""
    try:
        found, transformers = version("optimum-onnx"), version("transformers")
    except PackageNotFoundError:
        return []
    if int(transformers.split(".")[0]) < 5:
        return []
    return [
        f"optimum-onnx {found} is made for transformers below 4.58, here is {transformers}: "
        "`optimum-cli export onnx` may fail, this command does not use it; "
        "pip uninstall optimum-onnx, or keep it in an environment of its own"
    ]


def _parameter(name: str, annotation: Any, default: object) -> Parameter:
    """`annotation` is Annotated[type, typer.Option(...) or typer.Argument(...)]."""
    kind, info = annotation.__origin__, annotation.__metadata__[0]
    plain = next((each for each in get_args(kind) if each is not type(None)), kind)
    names: tuple[str, ...] = ()
    if isinstance(info, OptionInfo):
        words = (info.default, *(info.param_decls or ()))  # typer takes the first for a default
        given = [word for word in words if isinstance(word, str) and word.startswith("-")]
        names = tuple(sorted(given, key=len, reverse=True)) or (f"--{name.replace('_', '-')}",)
    return Parameter(name, names, info.help or "", plain, default is inspect.Parameter.empty)
