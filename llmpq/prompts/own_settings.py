"""A request's own settings beside its length: how tokens are sampled, and where the answer stops.

`temperature`, `top_p`, `top_k`, `seed` and `stop` are supported for each request, by the names that
OpenAI and vLLM use; the run's settings apply where a request has none. `refuse_unmet` knows the
settings that change an answer and that are not supported: such a request fails alone, unless the
value is the default (`n` of 1, no penalty). Other keys (`user`, `metadata`, `stream`) change no
answer, and `prompt_rules` ignores them.
"""

import json
import math
from collections.abc import Mapping
from typing import Any
from zlib import crc32

from llmpq.artifact import show_value
from llmpq.prompts.chat_messages import Refused, refuse_half_characters

SETTINGS = ("temperature", "top_p", "top_k", "seed")
MOST_STOPS, MOST_STOP_CHARACTERS = 16, 1000

# Settings that are not supported, and the values that have no effect.
ANYWHERE: dict[str, tuple[Any, ...]] = {
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "response_format": ({}, {"type": "text"}),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": ({},),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}
# Names that a table may use for other things: they count only in the body of a request.
OF_BODIES: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": ({},),
}
OWN_KNOWN = {*SETTINGS, "stop", *ANYWHERE}
BODY_KNOWN = {*OWN_KNOWN, *OF_BODIES}


def refuse_unmet(data: Mapping[str, object], is_body: bool) -> None:
    """Raises `Refused` where a request has a setting that is not supported."""
    for key, nothing in (*ANYWHERE.items(), *(OF_BODIES.items() if is_body else ())):
        value = data.get(key)
        if value is not None and value not in nothing:
            usual = f" (only {show_value(nothing[0])})" if nothing else ""
            raise Refused(f"'{key}' {show_value(value)} is not supported{usual}; leave it out")


def drawn_by(data: Mapping[str, object]) -> dict[str, float]:
    """The settings of `SETTINGS` that a request gives; raises `Refused` for odd values."""
    found: dict[str, float] = {}
    for key in SETTINGS:
        value: Any = data.get(key)
        if value is None:
            continue
        is_whole = key in ("top_k", "seed")
        if is_whole and isinstance(value, float) and value.is_integer():
            value = int(value)  # tables with empty cells have 5.0 for 5
        sort = int if is_whole else int | float
        if isinstance(value, bool) or not isinstance(value, sort) or not _fits(key, value):
            raise Refused(f"'{key}' must be {EXPECTED[key]}, found {show_value(value)}")
        found[key] = max(0, value) if key == "top_k" else value
    return found


EXPECTED = {
    "temperature": "a number from 0 to 1000",
    "top_p": "a number above 0, up to 1",
    "top_k": "an integer from 1 (0 or -1: all tokens)",
    "seed": "a 64-bit integer",
}


def _fits(key: str, value: float) -> bool:
    if key == "seed":
        return -(2**63) <= value < 2**64
    if key == "top_k":
        return -1 <= value < 2**63
    return math.isfinite(value) and (0 < value <= 1 if key == "top_p" else 0 <= value <= 1000)


def stops_of(data: Mapping[str, object]) -> tuple[str, ...]:
    """The texts before which an answer ends; raises `Refused` for other values.

    Raises `ValueError` for half a character, as in any text of a line.
    """
    given = data.get("stop")
    texts = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise Refused(f"'stop' must be a string or a list of strings, found {show_value(given)}")
    if len(texts) > MOST_STOPS or any(len(one) > MOST_STOP_CHARACTERS for one in texts):
        raise Refused(
            f"'stop' may hold at most {MOST_STOPS} strings, of at most {MOST_STOP_CHARACTERS} "
            "characters each"
        )
    for one in texts:
        refuse_half_characters("'stop'", one)
    return tuple(one for one in texts if one)


def with_settings(checksum: int, drawn: Mapping[str, float], stops: tuple[str, ...]) -> int:
    """A prompt's checksum, extended by its own settings; unchanged where it has none."""
    if not drawn and not stops:
        return checksum
    return crc32(json.dumps([dict(drawn), stops], sort_keys=True).encode(), checksum)


def cut_at(text: str, stops: tuple[str, ...]) -> str:
    """The part of a text before the first of `stops` in it."""
    positions = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(positions)] if positions else text


def has_stopped(text: str, stops: tuple[str, ...]) -> bool:
    """Whether one of `stops` is in a text."""
    return any(stop in text for stop in stops)


def tail_tokens(stops: tuple[str, ...]) -> int:
    """How many of the last tokens may hold a stop text that the last token completes.

    A token has at least one byte; four more are taken, as decoders treat first tokens specially.
    """
    return max(len(stop.encode()) for stop in stops) + 4
