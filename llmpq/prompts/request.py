"""One prompt, and what became of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Reason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt. `number` is its position in the prompts file.

    `checksum`: of the prompt and the request's own settings, by which a resumed run knows it again.
    `is_chat`: it is a chat, so that the answer is a message. `drawn`: how its tokens are drawn
    where that is not as the run says. `stops`: texts before which the answer ends.
    """

    id: str | int
    number: int
    prompt: tuple[int, ...]
    new_tokens: int
    checksum: int | None = field(default=None, compare=False)
    is_chat: bool = field(default=False, compare=False)
    drawn: Mapping[str, float] = field(default_factory=dict, compare=False)
    stops: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Finished:
    """A request's new tokens; `error` says why it failed alone, where `reason` is "error".

    `refused`: it was not computed, as it cannot be done as it was asked.
    """

    request: Request
    token_ids: tuple[int, ...]
    reason: Reason
    error: str | None = None
    refused: bool = False
