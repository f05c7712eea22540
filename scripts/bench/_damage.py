"""Damages to files, as disks, editors and scripts make them; the same ones for the same generator.

`damage` hurts any file; `damage_form` knows the form of the file (JSON, YAML, CSV, safetensors,
each possibly packed), so that it reaches single values, keys and cells as well, and returns what
was done too, in words that make the case easy to repeat by hand.
"""

import csv
import gzip
import io
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml

DEEP = "@deep@"  # stands for a value nested deeper than JSON readers go
Damage = Callable[[random.Random, bytes], tuple[bytes, str]]

ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 0.5, 2**31, 2**63, 10**30, 10**300, -(10**18), 1e308),
    *(float("inf"), float("nan"), "", "16", "\0", "\ud800", "é\u2028", "x" * 5000, "1e9"),
    *([], {}, [[]], [None], {"": None}, {"type": "t4-16g"}, {"min": 5, "max": 1}, DEEP),
]
CELLS = [
    "",
    "-1",
    "0",
    "nan",
    "inf",
    "1e30",
    "true",
    "x",
    '"',
    "9" * 40,
    "1,2",
    "é",
    "\x00",
    "x" * 9999,
]


def damage(rng: random.Random, sound: bytes) -> bytes:
    """One to three random damages to a file of JSON, JSON lines or anything else."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        sound = rng.choice([*BYTE_DAMAGES, *[change_json] * 6])(rng, sound)[0]
    return sound


def damage_form(rng: random.Random, sound: bytes, form: str) -> tuple[bytes, str]:
    """One damage to a file of a form: "json", "jsonl", "yaml", "csv", "safetensors" or "text".

    A form that ends in ".gz" is packed; half of its damages are to what is inside.
    """
    if form.endswith(".gz"):
        if rng.random() < 0.5:
            return rng.choice(BYTE_DAMAGES)(rng, sound)
        inner, what = damage_form(rng, gzip.decompress(sound), form.removesuffix(".gz"))
        return gzip.compress(inner, 1), f"inside: {what}"
    own = FORMS.get(form)
    if own is None or rng.random() < 0.3:
        return rng.choice([*BYTE_DAMAGES, *TEXT_DAMAGES])(rng, sound)
    return own(rng, sound)


# ---- of any bytes


def flip_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Other values for a few bytes."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(content) + 1)
        content[place : place + 1] = bytes([rng.randrange(256)])
    return bytes(content), "bytes flipped"


def cut(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """The end is missing."""
    length = rng.choice((0, rng.randrange(len(data) + 1)))
    return data[:length], f"cut after {length} bytes"


def remove(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A piece is missing."""
    start, size = rng.randrange(len(data) + 1), rng.randrange(200)
    return data[:start] + data[start + size :], f"{size} bytes gone at {start}"


def repeat(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A piece is there twice."""
    start = rng.randrange(len(data) + 1)
    end = start + rng.randrange(300)
    return data[:end] + data[start:], f"bytes {start} to {end} twice"


def insert(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Zeros, garbage or line breaks somewhere, or at the end."""
    garbage = bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
    nonsense = (b"\0" * rng.randrange(1, 9000), garbage, b"\n\n", b"\r", b"{}\n", b"\xef\xbb\xbf")
    place = rng.choice((0, len(data), rng.randrange(len(data) + 1)))
    added = rng.choice(nonsense)
    return data[:place] + added + data[place:], f"{added[:20]!r} added at {place}"


def swap_lines(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Lines in another order."""
    lines = data.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines), "lines shuffled"


BYTE_DAMAGES: list[Damage] = [flip_bytes, cut, remove, repeat, insert, swap_lines]


# ---- of any text


def mark(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Another encoding, with its byte-order mark."""
    encoding = rng.choice(("utf-8-sig", "utf-16", "utf-32", "latin-1"))
    return data.decode(errors="replace").encode(encoding, errors="replace"), f"as {encoding}"


def windows_lines(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Line ends as Windows or old Macs have them."""
    end = rng.choice((b"\r\n", b"\r"))
    return data.replace(b"\n", end), f"line ends {end!r}"


def long_line(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A very long line, or very deep nesting, at a place where lines end."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    added = rng.choice((b"x" * 3_000_000, b"[" * 100_000, b'{"a":' * 100_000, b" " * 1_000_000))
    return b"\n".join([*lines[:place], added, *lines[place:]]), f"{added[:5]!r}... as line {place}"


def twice(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """All of it twice, as a script that appends leaves it."""
    return data + data, "the whole file twice"


def a_line_twice(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One line twice."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    return b"\n".join([*lines[: place + 1], *lines[place:]]), f"line {place} twice"


TEXT_DAMAGES: list[Damage] = [mark, windows_lines, long_line, twice, a_line_twice]


# ---- of values


def change_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """JSON, or a line of JSON lines, with a value of another type or size, or other keys."""
    lines = [data] if data.startswith((b"{\n", b"[\n")) else data.split(b"\n")
    place = rng.randrange(len(lines))
    try:
        value = json.loads(lines[place])
    except (ValueError, RecursionError):
        return flip_bytes(rng, data)
    if rng.random() < 0.08 and isinstance(value, dict):
        lines[place], what = _key_twice(rng, value)
    else:
        value, what = changed(rng, value)
        lines[place] = odd_json(value)
    return b"\n".join(lines), what


def change_yaml(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """The same of YAML."""
    value, what = changed(rng, yaml.safe_load(data))
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=False)
    return text.replace(f"'{DEEP}'", "[" * 2000 + "]" * 2000).encode(), what


def changed(rng: random.Random, value: Any) -> tuple[Any, str]:
    """`value`, changed at one random place, and what was done there."""
    inside = isinstance(value, dict | list) and value and rng.random() < 0.9
    if not inside:
        odd = rng.choice(ODD_VALUES)
        return odd, f": {_short(value)} -> {_short(odd)}"
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    way = rng.random()
    if way < 0.08:
        del value[key]
        return value, f".{key} gone"
    if way < 0.12 and isinstance(value, dict):
        name = rng.choice(("extra", "id", "messages", "", "\ud800", f"{key}s", f"{key}_mib"))
        value[name] = value[key] if rng.random() < 0.5 else rng.choice(ODD_VALUES)
        return value, f".{name!r} added: {_short(value[name])}"
    if way < 0.16 and isinstance(value, dict):
        value[f"{key}_"] = value.pop(key)
        return value, f".{key} renamed"
    if way < 0.2 and isinstance(value, list):
        value.insert(key, value[key])
        return value, f".{key} twice"
    value[key], what = changed(rng, value[key])
    return value, f".{key}{what}"


def odd_json(value: Any) -> bytes:
    """JSON with whatever JSON writers of other languages let pass."""
    deep = "[" * 100_000 + "]" * 100_000
    return json.dumps(value).replace(json.dumps(DEEP), deep).encode()


def _key_twice(rng: random.Random, value: dict[str, Any]) -> tuple[bytes, str]:
    key = rng.choice(list(value))
    text = odd_json(value).decode()
    return f"{text[:-1]}, {json.dumps(key)}: {json.dumps(value[key])}}}".encode(), f".{key} twice"


def change_csv(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A table with another cell, or a cell, a row or a column too many or too few."""
    rows = list(csv.reader(io.StringIO(data.decode())))
    place = rng.randrange(len(rows))
    cell = rng.randrange(len(rows[place]))
    way = rng.randrange(6)
    if way == 0:
        del rows[place][cell]
    elif way == 1:
        rows[place].insert(cell, rng.choice(CELLS))
    elif way == 2:
        rows.insert(place, rows[place])
    elif way == 3:
        for row in rows:
            row.append(row[cell])
    else:
        rows[place][cell] = rng.choice(CELLS)
    text = io.StringIO()
    csv.writer(text, delimiter=rng.choice(",,,;\t")).writerows(rows)
    return text.getvalue().encode(), f"row {place} cell {cell} way {way}: {rows[place][:6]}"[:90]


def change_safetensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Another header, another length of it, or other numbers (infinite, not a number)."""
    size = struct.unpack("<Q", data[:8])[0]
    way = rng.randrange(4)
    if way == 0:
        odd = rng.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", odd) + data[8:], f"header of {odd} bytes"
    if way == 1:
        number = rng.choice((b"\xff\xff", b"\x80\x7f", b"\x80\xff", b"\x00\x7c"))  # NaN, infinite
        place = rng.randrange((len(data) - size - 8) // 2)
        start = 8 + size + 2 * place
        return data[:start] + number + data[start + 2 :], f"{number!r} at {start}"
    header, what = changed(rng, json.loads(data[8 : 8 + size]))
    text = odd_json(header)
    return struct.pack("<Q", len(text)) + text + data[8 + size :], f"header{what}"


FORMS: dict[str, Damage] = {
    "json": change_json,
    "jsonl": change_json,
    "yaml": change_yaml,
    "csv": change_csv,
    "safetensors": change_safetensors,
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:30]}...{len(text)}"
