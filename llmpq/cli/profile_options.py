"""Types of options that the profiling commands share."""

from typing import Any

import click

from llmpq.precision import PRECISIONS


class Integers(click.ParamType):
    """Positive integers with commas between: 1,2,4."""

    name = "n,n,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(sorted({int(part) for part in str(value).split(",")}))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers like 1,2,4", param, ctx)
        if numbers[0] < 1:
            self.fail(f"{numbers[0]} is not positive", param, ctx)
        return numbers


class PrecisionNames(click.ParamType):
    """Precisions with commas between: 16,8,4."""

    name = "precisions"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in str(value).split(",")))
        unknown = [name for name in names if name not in PRECISIONS]
        if unknown:
            self.fail(
                f"unknown precision {unknown[0]!r}; known: {', '.join(PRECISIONS)}", param, ctx
            )
        return names
