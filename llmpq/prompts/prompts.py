"""Reads prompts.jsonl: checks it whole before anything is loaded, then streams its requests.

The file is read twice. The first pass validates every line and keeps ids, lengths and checksums,
but no prompt. The second makes one request at a time, as the engine asks for them, so that long
prompts are never all in memory together. A line that changed in between ends the run with a
message; lines that were added at the end wait for the next run.

Not covered: what a line may say (`prompt_rules`), and which files can be read (`prompt_source`).
"""

from array import array
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from zlib import crc32

from llmpq.artifact import MAX_FAULTS, show_value
from llmpq.errors import UserError
from llmpq.prompts.prompt_rules import (
    BATCH_KEYS,
    BODY_KEYS,
    OWN_KEYS,
    CheckedLine,
    Limits,
    Rules,
    Tokenizer,
    show,
)
from llmpq.prompts.prompt_source import Line, PromptSource, open_source
from llmpq.prompts.request import Request
from llmpq.prompts.result_lines import Form, Id

MAX_NAMES = 1000  # the keys that are counted one by one
MOST_SHOWN = 8  # the keys that a message names


class PromptFile:
    """A checked file of prompts: the ids and lengths of its requests, but not their tokens.

    `refused` maps the numbers of requests that cannot be served to the reason; their lengths are 0.
    `drawn` holds the sampling settings of requests that have their own. `notes` says what a user
    should know about how the file was read.
    """

    def __init__(self, source: PromptSource, rules: Rules) -> None:
        self.path = source.path
        self.ids: list[Id] = []
        self.lengths: list[tuple[int, int]] = []  # (prompt tokens, new tokens), like the ids
        self.refused: dict[int, str] = {}
        self.drawn: dict[int, Mapping[str, float]] = {}
        self.notes: list[str] = []
        self._source, self._rules = source, rules
        self._checksums, self._line_numbers = array("I"), array("Q")
        self._offsets, self._marks = array("Q"), array("I")
        self._facts = _FileNotes()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def form(self) -> Form:
        """The form of the output: OpenAI's where every line is of that form."""
        return "openai" if self._facts.num_openai == len(self) else "llmpq"

    @property
    def is_mixed(self) -> bool:
        """Whether the file has lines of both forms."""
        return 0 < self._facts.num_openai < len(self)

    def request(self, number: int) -> Request:
        """The request at this position, read from the file now.

        Raises `UserError` where its line is not the one that was checked.
        """
        line = self._source.read(self._offsets[number])
        if crc32(line) != self._checksums[number]:
            raise self._changed(f"{self.path}:{self._line_numbers[number]}")
        return self._rules.request(line, number)

    def stream(self, done: Container[Id] = ()) -> Iterator[Request]:
        """Yields the requests whose ids are not in `done`, in the order of the file."""
        for number in self.todo(done):
            yield self.request(number)

    def todo(self, done: Container[Id]) -> dict[int, tuple[int, int]]:
        """The lengths, by number, of the requests that can be served and are not in `done`."""
        return {
            number: self.lengths[number]
            for number, name in enumerate(self.ids)
            if name not in done and number not in self.refused
        }

    def checksums(self) -> Mapping[Id, int]:
        """The checksum of every request's prompt, by its id."""
        return dict(zip(self.ids, self._marks, strict=True))

    def add(self, asked: CheckedLine, line: Line) -> None:
        """Adds a checked request."""
        request, number = asked.request, len(self.ids)
        self.ids.append(request.id)
        self._marks.append(request.checksum or 0)
        self._checksums.append(crc32(line.text))
        self._offsets.append(line.offset)
        self._line_numbers.append(line.number)
        if asked.refusal is None:
            self.lengths.append((len(request.prompt), request.new_tokens))
            if request.drawn:
                self.drawn[number] = request.drawn
        else:
            self.refused[number] = asked.refusal
            self.lengths.append((0, 0))
        self._facts.add(asked, line.number)

    def tell(self) -> None:
        """Fills `notes`, once the whole file was read."""
        self.notes = [*self._source.notes]
        self.notes += [f"{self.path}: {note}" for note in self._facts.notes()]
        if self.refused:
            number, reason = next(iter(self.refused.items()))
            where = f"line {self._line_numbers[number]}"
            self.notes.append(
                f"{self.path}: requests that cannot be served and fail alone: {len(self.refused)} "
                f"(the first: {where}: {reason})"
            )

    def _changed(self, where: str) -> UserError:
        return UserError(
            f"{where}: changed after it was checked, when the run started; finished requests are "
            "safe, --resume continues with the file as it is now"
        )


class _FileNotes:
    """Counts facts that one note for the whole file reports."""

    def __init__(self) -> None:
        self.num_openai = 0
        self._left_out: Counter[str] = Counter()
        self._models: Counter[str] = Counter()
        self._num_cut, self._first_cut = 0, ""
        self._num_drawn = 0

    def add(self, asked: CheckedLine, line_number: int) -> None:
        self.num_openai += asked.is_openai
        self._num_drawn += bool(asked.request.drawn)
        for name in asked.left_out:
            _count(self._left_out, name)
        if asked.model is not None:
            _count(self._models, asked.model)
        if asked.num_cut:
            kept = len(asked.request.prompt)
            first = f"line {line_number}: {kept + asked.num_cut} tokens to {kept}"
            self._first_cut = self._first_cut or first
            self._num_cut += 1

    def notes(self) -> Iterator[str]:
        if self._left_out:
            names = (f"{_suggested(k)} ({n} lines)" for k, n in _most(self._left_out))
            yield f"unknown keys that were ignored: {_joined(names, self._left_out)}"
        if self._num_drawn:
            yield (
                f"requests with sampling settings of their own: {self._num_drawn}; settings that "
                "they lack are those of --temperature, --top-p, --top-k and --seed"
            )
        if self._models:
            names = (f"{show(k)} ({n} lines)" for k, n in _most(self._models))
            named = _joined(names, self._models)
            yield f"lines name a model, but the plan's model is used: {named}"
        if self._num_cut:
            yield (
                "prompts that were too long and were cut at their beginning (--too-long truncate): "
                f"{self._num_cut} (the first: {self._first_cut})"
            )


def check_prompts(
    path: Path,
    tokenizer: Tokenizer | None,
    limits: Limits,
    chat: bool = False,
) -> PromptFile:
    """Checks every line of a file.

    Raises one `UserError` that lists every broken line (the first 20, and how many more).
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{path}: --chat: the model's tokenizer has no chat template; "
            "use a chat model, or give whole prompts without --chat"
        )
    source = open_source(path)
    found = PromptFile(source, Rules(tokenizer, limits, chat))
    faults: list[str] = []
    num_faults = 0
    for number, fault in (*source.faults, *_check(found)):
        num_faults += 1
        if num_faults <= MAX_FAULTS:
            faults.append(f"{path}:{number}: {fault}")
    if num_faults > MAX_FAULTS:
        faults.append(f"{path}: and {num_faults - MAX_FAULTS} more lines like these")
    if faults:
        raise UserError("\n".join(faults))
    if not found:
        raise UserError(f"{path}: holds no prompts")
    found.tell()
    return found


def _check(found: PromptFile) -> Iterator[tuple[int, str]]:
    """Adds every valid line to `found`; yields the number and fault of every other line."""
    seen: dict[Id, int] = {}
    for line in found._source.lines():
        try:
            asked = found._rules.asked(line.text, len(found))
            name = asked.request.id
            if name in seen:
                raise ValueError(f"id {show_value(name)} was already used on line {seen[name]}")
            seen[name] = line.number
            found.add(asked, line)
        except ValueError as error:
            yield line.number, str(error)


def _count(counter: "Counter[str]", name: str) -> None:
    """Counts a name; beyond `MAX_NAMES` all new names count as one."""
    counter[name if name in counter or len(counter) < MAX_NAMES else "others"] += 1


def _most(counter: "Counter[str]") -> list[tuple[str, int]]:
    return counter.most_common(MOST_SHOWN)


def _joined(names: Iterator[str], counter: "Counter[str]") -> str:
    more = len(counter) - MOST_SHOWN
    return ", ".join(names) + (f" and {more} more names" if more > 0 else "")


def _suggested(name: str) -> str:
    """A key, with the known key that may be meant."""
    inside = name.startswith("body.")
    known = BODY_KEYS if inside else OWN_KEYS | BATCH_KEYS
    near = get_close_matches(name.removeprefix("body.")[:40], known, n=1, cutoff=0.8)
    return show(name[:60]) + (f", perhaps '{near[0]}' is meant" if near else "")
