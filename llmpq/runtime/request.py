"""One prompt, and what became of it."""

from dataclasses import dataclass
from typing import Literal

Reason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt. `number` is its position in the prompts file."""

    id: str | int
    number: int
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Finished:
    """A request's new tokens; `error` says why it failed alone, where `reason` is "error"."""

    request: Request
    token_ids: tuple[int, ...]
    reason: Reason
    error: str | None = None
