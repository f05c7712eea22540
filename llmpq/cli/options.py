"""Options of commands: those of one command are the fields of one frozen dataclass.

A field's annotation says how its words are read, its default is the option's, and `option` holds
the help text. `command` makes a click command of a function that takes such a dataclass. Options
that several commands have are declared here, in classes that theirs extend.

Not covered: which options go together, which each command checks itself.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click

from llmpq.cli.common import Command
from llmpq.precision import KNOWN_NAMES, is_layer_precision
from llmpq.version import __version__

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
HELP = {"help_option_names": ["-h", "--help"]}
LAST = ("device", "dtype", "json_path", "verbose", "quiet")  # in the help text
AnyOptions = TypeVar("AnyOptions", bound="CommonOptions")


class FiniteRange(click.FloatRange):
    """A range of numbers without infinity and NaN."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return float(number)


class Listed(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases
    """Words with commas between, each once: 16,8,4."""

    name = "n,n,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        words = dict.fromkeys(part.strip() for part in str(value).split(",") if part.strip())
        if not words:
            self.fail(f"{value!r} names nothing; expected values with commas between", param, ctx)
        return self.parsed(tuple(words), param, ctx)

    def parsed(self, words: tuple[str, ...], param: Any, ctx: Any) -> tuple[Any, ...]:
        """Converts the words to values, or fails."""
        return words


class Integers(Listed):
    """Positive integers with commas between, in order: 1,2,4."""

    def parsed(self, words: tuple[str, ...], param: Any, ctx: Any) -> tuple[int, ...]:
        try:
            numbers = tuple(sorted({int(word) for word in words}))
        except ValueError:
            self.fail(f"{','.join(words)!r} is not a list of integers like 1,2,4", param, ctx)
        if numbers[0] < 1:
            self.fail(f"{numbers[0]} is not positive", param, ctx)
        return numbers


class PrecisionNames(Listed):
    """Precisions of layers with commas between: 16,8,8+experts@4."""

    def parsed(self, words: tuple[str, ...], param: Any, ctx: Any) -> tuple[str, ...]:
        for word in words:
            if not is_layer_precision(word):
                self.fail(f"unknown precision {word!r}; known: {KNOWN_NAMES}", param, ctx)
        return words


def option(help: str = "", *names: str, default: Any = None, **settings: Any) -> Any:
    """A dataclass field that is a command-line option.

    `names`: as click takes them; none: `--field-name`. Without a default the value may be None.
    `settings` are click's own, such as a `type` that the annotation does not tell.
    """
    return field(default=default, metadata={"help": help, "names": names, "settings": settings})


def required(help: str, *names: str, **settings: Any) -> Any:
    """An option that must be given."""
    return field(metadata={"help": help, "names": names, "settings": settings | {"required": True}})


def arguments() -> Any:
    """Files that follow the options, as many as there are: a tuple of paths."""
    return field(default=(), metadata={"argument": True})


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options of every command."""

    json_path: Path | None = option(
        "Also write the result as JSON to this file ('-': standard output).",
        "--json",
        type=click.Path(path_type=Path, allow_dash=True),
    )
    verbose: bool = option("Say more.", "-v", "--verbose", default=False)
    quiet: bool = option("Say nothing but errors.", "-q", "--quiet", default=False)


@dataclass(frozen=True, kw_only=True)
class TorchOptions(CommonOptions):
    """Options of commands that compute with a model."""

    device: DeviceName = option(
        "Where to compute; auto: on a GPU where there is one.", default="auto"
    )
    dtype: DtypeName = option(
        "Data type of activations, and of weights at 16 bits.", default="auto"
    )


@dataclass(frozen=True, kw_only=True)
class CostOptions(CommonOptions):
    """Options of commands that plan: the devices, and what layers cost on them."""

    cluster: Path | None = option("cluster.yaml: nodes, devices and links.")
    profiles: Path | None = option("Folder of profiles; default: estimates from spec sheets.")
    sensitivity: Path | None = option(
        "sensitivity.json; default: a generic estimate, not measured for this model."
    )
    max_quality_loss: float | None = option(
        "Percent by which perplexity may rise.", type=FiniteRange(min=0)
    )


def command(
    options: type[AnyOptions], name: str | None = None
) -> Callable[[Callable[[AnyOptions], None]], click.Command]:
    """Makes a command of a function that takes these options; its docstring is the help text."""

    def decorate(function: Callable[[AnyOptions], None]) -> click.Command:
        def call(**values: Any) -> None:
            function(options(**values))

        made = Command(
            name or function.__name__,
            context_settings={"show_default": True, **HELP},
            callback=call,
            params=parameters(options),
            help=function.__doc__,
        )
        click.version_option(__version__, prog_name="llmpq")(made)
        return made

    return decorate


def parameters(options: type[CommonOptions]) -> list[click.Parameter]:
    """The click parameters of a class of options: those that are required and the model first."""

    def place(one: "Field[Any]") -> tuple[int, bool, bool]:
        is_required = one.metadata.get("settings", {}).get("required", False)
        late = LAST.index(one.name) + 1 if one.name in LAST else 0
        return late, not is_required, one.name != "model"

    return [_parameter(one) for one in sorted(dataclasses.fields(options), key=place)]


def _parameter(one: "Field[Any]") -> click.Parameter:
    if "argument" in one.metadata:
        return click.Argument([one.name], nargs=-1, type=click.Path(path_type=Path))
    settings = {"help": one.metadata["help"]} | _read_as(one.type) | one.metadata["settings"]
    if one.default is not MISSING and not settings.get("multiple"):
        settings["default"] = one.default
    dashed = one.name.replace("_", "-")
    is_pair = one.type is bool and one.default is True
    usual = f"--{dashed}/--no-{dashed}" if is_pair else f"--{dashed}"
    return click.Option([*(one.metadata["names"] or [usual]), one.name], **settings)


def _read_as(annotation: Any) -> dict[str, Any]:
    """Returns click's settings for a type: a flag, a choice, a path or a plain value."""
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if is_union else (annotation,)
    kind = next(one for one in kinds if one is not NoneType)
    if kind is bool:
        return {"is_flag": True}
    if get_origin(kind) is Literal:
        return {"type": click.Choice(get_args(kind))}
    if kind is Path:
        return {"type": click.Path(path_type=Path)}
    return _read_as(get_args(kind)[0]) if get_origin(kind) is tuple else {"type": kind}
