"""Reads sizes from a model's `config.json` and collects what is wrong with them."""

from collections.abc import Mapping
from typing import Any

from llmpq.artifact import show_value
from llmpq.errors import UserError

MOST_SIZE = 2**31 - 1  # of anything that a configuration counts
MOST_LAYERS, LAYER_KEYS = 10_000, ("num_hidden_layers", "n_layer", "n_layers")


class ConfigKeys:
    """The settings of one configuration; `source` names it in messages."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data = data
        self.source = source
        self.faults: list[str] = []

    def text(self, key: str) -> str:
        """The text under a key; raises `UserError` at once where there is none."""
        value = self.data.get(key)
        if not isinstance(value, str):
            raise UserError(f"{self.source}: '{key}' is missing or not a string")
        return value

    def count(self, *names: str, default: int | None = None) -> int:
        """The first of `names` that is present, a positive integer."""
        for name in names:
            value = self.data.get(name)
            if value is None:
                continue
            most = MOST_LAYERS if name in LAYER_KEYS else MOST_SIZE
            if isinstance(value, int) and value > most:
                large = f"'{name}' is {show_value(value)}, more than {most}"
                self.faults.append(f"{self.source}: {large}, the most that llmpq takes")
                return 1
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                self.faults.append(
                    f"{self.source}: '{name}' must be a positive integer: {show_value(value)}"
                )
                return 1
            return value
        if default is None:
            self.faults.append(f"{self.source}: '{names[0]}' is missing")
        return default or 1

    def flag(self, key: str, default: bool) -> bool:
        """A setting that is true or false; null counts as false."""
        value = self.data.get(key, default)
        if value is not None and not isinstance(value, bool):
            self.faults.append(f"{self.source}: '{key}' must be true or false: {show_value(value)}")
        return bool(value)

    def raise_faults(self) -> None:
        """Raises one `UserError` with all that was found wrong."""
        if self.faults:
            raise UserError("\n".join(dict.fromkeys(self.faults)))
