"""Files between the steps: JSON and YAML, read with strict validation, written with provenance.

Every file is described by a `Strict` model. Reading reports all errors of a file at once, each
with file, line, the value found and what was expected, as one `UserError`. Nothing is guessed: a
key that is there twice, a text for a number and a yes-or-no for a number are faults. Writing goes
to a temporary file beside the target first, so that a reader never sees half a file.

Text files may begin with a byte-order mark, as those written on Windows do, which also tells UTF-16
and UTF-32. What is not a regular file (a pipe, a device) is refused before it is opened, as reading
it may never end; so is a file far too large for what it should hold.
"""

import codecs
import json
import os
import platform
import re
import reprlib
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from llmpq.errors import UserError, one_line
from llmpq.version import __version__
from llmpq.whole_file import whole_file

SCHEMA_VERSION: Final = 1
MAX_DIGITS = 19
# What makes a JSON text worth a second look: integers beyond 64 bits, halves of characters.
_LONG_INTEGER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_HALF_CHARACTER = re.compile(r"\\(u|U0000)[dD][89a-fA-F]")
FETCH_LFS = "a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'"
MAX_FAULTS = 20  # a file with more is broken throughout; the first ones say how
MAX_TEXT_BYTES = 1 << 28  # of JSON and plain text: reading more takes minutes and all memory
MAX_YAML_BYTES = 1 << 22  # YAML is written by hand, and slow to read
# What a text file may begin with, and the name of its encoding, which skips it. In this order: the
# mark of UTF-32 begins like that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Strict(BaseModel):
    """A frozen value that refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


M = TypeVar("M", bound=Strict)


class Provenance(Strict):
    """Where a file came from."""

    tool: str = "llmpq"
    version: str = __version__
    created: str = ""
    host: str = ""
    device: str = ""

    @classmethod
    def here(cls, device: str = "") -> Self:
        """Provenance of a file written now, on this host."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(created=now, host=platform.node(), device=device)


def read_text(path: Path, most_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a file a user named; every line ends with a line feed alone."""
    try:
        refuse_unless_regular(path)
        size = path.stat().st_size
        if size > most_bytes:
            raise UserError(
                f"{path}: has {size >> 20} MiB; a file of this kind has {most_bytes >> 20} MiB at "
                "most, so this must be another file"
            )
        data = path.read_bytes()
        text = data.decode(text_encoding(data))
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        name = "UTF-8" if error.encoding.startswith("utf-8") else error.encoding
        raise UserError(f"{path}: not {name} text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def text_encoding(start: bytes) -> str:
    """The encoding of a text that begins so; it skips a byte-order mark. UTF-8 where none is."""
    marks = (mark for mark in BYTE_ORDER_MARKS if start.startswith(mark) and start != mark)
    return BYTE_ORDER_MARKS[next(marks, codecs.BOM_UTF8)]


def refuse_unless_regular(path: Path) -> None:
    """Raises `UserError` for a folder, a pipe or a device, and `OSError` where nothing is there."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a directory, expected a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is not a regular file; save its contents to one")


def read_json(path: Path, kind: type[M]) -> M:
    """Reads and validates a JSON file."""
    return _writable(validate(parse_json(path), kind, path), read_text(path), path)


def _writable(value: M, text: str, path: Path) -> M:
    """The value, if it can be written again; only escapes in the file's text can make it not so."""
    if _HALF_CHARACTER.search(text):
        try:
            value.model_dump_json()
        except ValueError:
            raise _half_character(path) from None
    return value


def _half_character(path: Path) -> UserError:
    return UserError(f"{path}: a string contains a lone surrogate (half a character)")


def parse_json(path: Path) -> Any:
    """The value in a JSON file; a syntax error is a `UserError` with its line."""
    text = read_text(path)
    parse_int = _bounded_int if _LONG_INTEGER.search(text) else None
    try:
        return json.loads(text, parse_int=parse_int, object_pairs_hook=no_repeated_keys)
    except RepeatedKey as error:
        line = _line_of_repeated(_compose(path), error.key)
        where = f"{path}:{line}" if line else str(path)
        raise UserError(f"{where}: not valid JSON: {error}") from None
    except json.JSONDecodeError as error:
        if is_lfs_pointer(text.encode()):
            raise UserError(f"{path}: {FETCH_LFS}") from None
        where = f"{path}:{error.lineno}"
        raise UserError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # an integer too large
        raise UserError(f"{path}: not valid JSON: {error}") from None


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins so stands for another one, which Git LFS has yet to fetch."""
    return start.startswith(b"version https://git-lfs.github.com/spec")


class RepeatedKey(ValueError):
    """A key is twice in one object, and nothing says which value is meant."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {show_value(key)} occurs twice")
        self.key = key


def no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` of JSON readers; raises `RepeatedKey`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise RepeatedKey(next(k for k, _ in pairs if k in seen or seen.add(k)))  # type: ignore[func-returns-value]
    return found


def _bounded_int(text: str) -> int:
    """Every count and size has 64 bits; products of larger ones overflow later, far from here."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{text[:MAX_DIGITS]}... is an integer of {len(text)} digits")
    return int(text)


def read_yaml(path: Path, kind: type[M]) -> M:
    """Reads and validates a YAML file."""
    text = read_text(path, MAX_YAML_BYTES)
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except Exception as error:  # a tag that does not fit its value raises one of many kinds
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    return _writable(validate(data, kind, path), text, path)


class _Loader(yaml.SafeLoader):
    """PyYAML's, which takes the last of a key's values and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, where no key is there twice."""
        repeated = _repeated(node)
        if repeated is not None:
            what = f"the key {show_value(repeated.value)} occurs twice"
            raise yaml.constructor.ConstructorError(None, None, what, repeated.start_mark)
        return super().construct_mapping(node, deep)


def validate(data: Any, kind: type[M], path: Path) -> M:
    """`data` as a `kind`, or one `UserError` that lists every fault with its line in `path`."""
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values, found {show_value(data)}")
    try:
        value = kind.model_validate(data)
        if faults := list(_converted(data, value.model_dump(), ())):
            root = _compose(path)
            raise UserError("\n".join(_converted_fault(path, root, *one) for one in faults))
        return value
    except UnicodeEncodeError:  # by a message that quotes it
        raise _half_character(path) from None
    except ValidationError as error:
        root = _compose(path)
        lines = [_fault(path, root, data, fault, kind) for fault in error.errors()]
        lines = list(dict.fromkeys(lines))
        if len(lines) > MAX_FAULTS:
            more = f"{path}: and {len(lines) - MAX_FAULTS} more faults"
            lines = [*lines[:MAX_FAULTS], more]
        text = "\n".join(lines).encode("utf-8", "backslashreplace").decode()  # lone surrogates
        raise UserError(text) from None


def write_json(path: Path, value: BaseModel) -> None:
    """Writes a value as JSON, whole or not at all; every key is there, what is absent is null."""
    write_text(path, value.model_dump_json(indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all; what is no regular file is written into."""
    try:
        path = Path(os.path.realpath(path))  # a link stays one
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_text(text, encoding="utf-8")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def cache_folder() -> Path:
    """Where what can be computed again is kept, by the XDG rules."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmpq"


def _converted(
    found: Any, taken: Any, keys: tuple[Any, ...]
) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Where a text was taken for a number, or a yes-or-no for one: keys, what it was and became."""
    if isinstance(found, dict) and isinstance(taken, dict):
        for key, value in found.items():
            if key in taken:
                yield from _converted(value, taken[key], (*keys, key))
    elif isinstance(found, list | tuple) and isinstance(taken, list | tuple):
        for place, (value, own) in enumerate(zip(found, taken, strict=False)):
            yield from _converted(value, own, (*keys, place))
    elif _sort(found) != _sort(taken):
        yield keys, found, taken


def _sort(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "a text" if isinstance(value, str) else None


def _converted_fault(
    path: Path, root: yaml.Node | None, keys: tuple[Any, ...], found: Any, taken: Any
) -> str:
    line = _line_of(root, list(keys))
    where = f"{path}:{line}" if line else str(path)
    name = ".".join(map(str, keys))
    return f"{where}: {name}: expected {_sort(taken)} (found {show_value(found)})"


def _fault(path: Path, root: yaml.Node | None, data: Any, fault: Any, kind: type[BaseModel]) -> str:
    keys = _keys_in_file(data, fault["loc"])
    line = _line_of(root, keys)
    where = f"{path}:{line}" if line else str(path)
    name = ".".join(str(key) for key in keys) or "the file"
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key '{name}'{_known_keys(kind, keys)}"
    if fault["type"] == "missing":
        return f"{where}: '{name}' is missing"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if keys and not isinstance(fault["input"], dict | list):
        message += f" (found {show_value(fault['input'])})"
    return f"{where}: {name}: {message}"


def _keys_in_file(data: Any, loc: tuple[Any, ...]) -> list[Any]:
    """`loc` without the names of union branches, which pydantic mixes in with the file's keys."""
    keys = []
    for key in loc:
        if _holds(data, key):
            data = data[key]
        elif _is_union_branch(key):
            continue
        keys.append(key)
    return keys


def _holds(data: Any, key: Any) -> bool:
    if isinstance(data, list):
        return isinstance(key, int) and key < len(data)
    return isinstance(data, dict) and key in data


def _is_union_branch(key: Any) -> bool:
    # pydantic names the branch it tried ("int", "constrained-int", "MinMax", "literal['auto']").
    return isinstance(key, str) and (
        key in ("int", "float", "str") or key[:1].isupper() or "[" in key or "-" in key
    )


def _known_keys(kind: type[BaseModel], keys: list[Any]) -> str:
    return f"; known here: {', '.join(kind.model_fields)}" if len(keys) == 1 else ""


def _compose(path: Path) -> yaml.Node | None:
    """The file's tree with line numbers, if it can be had (JSON is read as YAML)."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.compose(read_text(path), Loader=loader)
    except (UserError, yaml.YAMLError, RecursionError, ValueError):
        return None


def _repeated(node: yaml.MappingNode) -> yaml.Node | None:
    """The first key that was there before; merges (`<<`) are no keys."""
    seen: set[tuple[str, Any]] = set()
    for key, _ in node.value:
        name = (key.tag, str(key.value))
        if name in seen and isinstance(key, yaml.ScalarNode) and key.value != "<<":
            return key
        seen.add(name)
    return None


def _line_of_repeated(root: yaml.Node | None, name: str) -> int | None:
    """Where a key of this name is there for the second time."""
    rest = [root] if root is not None else []
    while rest:
        node = rest.pop()
        if isinstance(node, yaml.MappingNode):
            key = _repeated(node)
            if key is not None and key.value == name:
                return key.start_mark.line + 1  # type: ignore[no-any-return]
            rest += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            rest += node.value
    return None


def _line_of(root: yaml.Node | None, keys: list[Any]) -> int | None:
    """The line of the deepest of `keys` that the file holds."""
    if root is None:
        return None
    node = root
    line = node.start_mark.line + 1
    for key in keys:
        found = _child(node, key)
        if found is None:
            break
        mark, node = found
        line = mark.line + 1
    return line


def _child(node: yaml.Node, key: Any) -> tuple[yaml.Mark, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(key):
                return name.start_mark, value
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key].start_mark, node.value[key]
    return None


def show_value(value: Any) -> str:
    """A value of a file for a message: 60 characters at most, however long or deep it is."""
    text = reprlib.repr(value)  # bounded in depth and length, whatever a file's aliases unfold to
    return text if len(text) <= 60 else text[:57] + "..."
