"""One prompt, and what became of it."""

from dataclasses import dataclass, field
from typing import Literal

Reason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt. `number` is its position in the prompts file.

    `checksum`: of the prompt, by which a resumed run knows it again. `is_chat`: it is a chat, so
    that the answer is a message.
    """

    id: str | int
    number: int
    prompt: tuple[int, ...]
    new_tokens: int
    checksum: int | None = field(default=None, compare=False)
    is_chat: bool = field(default=False, compare=False)


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
