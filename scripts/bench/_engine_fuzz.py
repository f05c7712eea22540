"""Broken files for llmpq-run: only messages may come out, and no intact result may be lost.

Plans, prompts, outputs and journals are damaged as disks, editors and scripts damage them: bytes
flipped, ends torn, zeros and garbage, values of another type or size, keys gone, deep nesting.
Each case is read by the functions that llmpq-run itself calls, one in `CLI_EVERY` plans and
prompts by its whole command line with --dry-run, which stops where weights would be loaded.
"""

import json
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _damage import damage

from llmpq.artifact import write_json
from llmpq.errors import LlmpqError
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.plan_data import Plan, load_plan, refuse_shared_stages
from llmpq.prompts.prompts import Limits, check_prompts
from llmpq.prompts.request import Finished, Request
from llmpq.reliability.journal import Results
from llmpq.reliability.repair import unframe
from llmpq.workload import request_lengths

MODEL = ASSETS / "tiny-tales"
CLI_EVERY = 25
LIMITS = Limits(new_tokens=4, max_positions=64, vocab_size=300)
RUN: dict[str, object] = {"model": "tiny", "seed": 0, "precisions": ["16", "8"]}


class ByteTokenizer:
    """A token for every byte of UTF-8; a chat is its messages, one a line."""

    chat_template = "(built in)"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode(errors="replace")

    def apply_chat_template(
        self, conversation: list[dict[str, str]], **options: object
    ) -> list[int]:
        return self.encode("\n".join(f"{m['role']}: {m['content']}" for m in conversation))


@dataclass
class FuzzResult:
    """What came of the cases; `num_lost` counts intact results that a resumed run did not keep."""

    num_examples: int = 0
    num_tracebacks: int = 0
    longest_s: float = 0.0
    num_lost: int = 0
    failures: list[str] = field(default_factory=list)  # what happened, and how to see it again


def fuzz(examples: int, seed: int) -> FuzzResult:
    """`examples` damaged files, the same ones for the same seed."""
    found = FuzzResult()
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(Path(folder))
        cases.dry_run(cases.plan, cases.prompts)  # imports, once
        for number in range(examples):
            kind = ("plan", "prompts", "results", "results")[number % 4]
            rng = random.Random(f"{seed} {number}")
            _one_case(found, f"seed {seed}, case {number} ({kind})", cases.case(kind, rng, number))
    return found


def _one_case(found: FuzzResult, name: str, case: Callable[[], list[str]]) -> None:
    found.num_examples += 1
    started = time.perf_counter()
    try:
        lost = case()
        found.num_lost += len(lost)
        found.failures += [f"{name}: lost {line}" for line in lost]
    except Exception:
        found.num_tracebacks += 1
        found.failures.append(f"{name}: {traceback.format_exc(limit=-3)}")
    found.longest_s = max(found.longest_s, time.perf_counter() - started)


class Cases:
    """Sound files to damage, and what reads the damaged ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan, self.prompts = folder / "plan.json", folder / "prompts.jsonl"
        write_json(self.plan, sound_plan())
        self.prompts.write_bytes(sound_prompts())
        self.sound_plan, self.sound_prompts = self.plan.read_bytes(), self.prompts.read_bytes()
        self.sound_results = sound_results(folder / "sound.jsonl")

    def case(self, kind: str, rng: random.Random, number: int) -> Callable[[], list[str]]:
        """A case to run; it says what was lost."""
        if kind == "results":
            return self._damaged_results(rng)
        sound = self.sound_plan if kind == "plan" else self.sound_prompts
        path = self.folder / f"damaged-{kind}"
        path.write_bytes(damage(rng, sound))
        if number % CLI_EVERY < 2:
            files = (path, self.prompts) if kind == "plan" else (self.plan, path)
            return lambda: self.dry_run(*files)
        is_chat = rng.random() < 0.5
        return lambda: read_plan(path) if kind == "plan" else read_prompts(path, is_chat)

    def dry_run(self, plan: Path, prompts: Path) -> list[str]:
        """llmpq-run up to where weights are loaded; raises whatever it lets escape."""
        from click.testing import CliRunner

        from llmpq.cli.run import main

        output = self.folder / "dry.jsonl"
        words = ["--plan", plan, "--prompts", prompts, "--output", output, "--model", MODEL]
        result = CliRunner().invoke(main, [*map(str, words), "--dry-run", "-q"])
        escaped = result.exception
        if escaped is not None and not isinstance(escaped, SystemExit):
            raise escaped
        assert result.exit_code in (0, 2, 3), result.exit_code
        assert not output.exists()
        return []

    def _damaged_results(self, rng: random.Random) -> Callable[[], list[str]]:
        output = self.folder / "damaged.jsonl"
        contents = list(self.sound_results)
        for place in {0: [0], 1: [1], 2: [0, 1]}[rng.randrange(3)]:
            contents[place] = damage(rng, contents[place])
        return lambda: resume_results(output, *contents, sound=self.sound_results[0])


def read_plan(path: Path) -> list[str]:
    """As llmpq-run reads it; raises what is no `LlmpqError`."""
    try:
        plan = load_plan(path)
        refuse_shared_stages(plan, path)
        request_lengths(plan.workload)
    except LlmpqError as error:
        _check_message(error)
    return []


def read_prompts(path: Path, is_chat: bool) -> list[str]:
    """As llmpq-run reads it; raises what is no `LlmpqError`."""
    try:
        found = check_prompts(path, ByteTokenizer(), LIMITS, chat=is_chat)
    except LlmpqError as error:
        _check_message(error)
        return []
    requests = list(found.stream())
    can_be_done = [name for i, name in enumerate(found.ids) if i not in found.refused]
    assert [request.id for request in requests] == can_be_done
    assert len(set(found.ids)) == len(found) == len(found.lengths)
    return []


def resume_results(output: Path, shown: bytes, logged: bytes, sound: bytes) -> list[str]:
    """Goes on from damaged files; the sound results in either of them that are lost by that."""
    for path in output.parent.glob(f"{output.name}*"):
        path.unlink()
    journal = output.with_name(f"{output.name}.journal")
    output.write_bytes(shown)
    journal.write_bytes(logged)
    expected = intact(shown, logged, sound)
    try:
        with closing(Results(output, True, "never", RUN)) as results:
            results.write(_finished("new", 9), "new")
    except LlmpqError as error:
        _check_message(error)
        unchanged = output.read_bytes() == shown and journal.read_bytes() == logged
        return [] if unchanged else ["a refused file was changed"]
    lines = output.read_bytes().split(b"\n")[:-1]
    names = [json.loads(line)["id"] for line in lines if line.strip()]
    assert len(set(names)) == len(names) and set(names) == results.finished, "ids are not unique"
    kept = set(lines)
    return [line.decode() for line in expected if line not in kept]


def intact(shown: bytes, logged: bytes, sound: bytes) -> list[bytes]:
    """Sound lines that are whole in the damaged output or journal.

    A line is left out where damage to both files made another one of the same id: nothing tells
    which of them is the sound one.
    """
    in_output = set(shown.split(b"\n"))
    payloads = map(unframe, logged.split(b"\n"))
    in_journal = {payload.line for payload in payloads if payload is not None}
    found = []
    for line in sound.split(b"\n")[:-1]:
        id_text = line[: line.index(b",")]
        is_alone = sum(other.startswith(id_text) for other in in_output) == 1
        if line in in_journal or (line in in_output and is_alone):
            found.append(line)
    return found


def _check_message(error: LlmpqError) -> None:
    """What a terminal can print, of a length that a person reads."""
    assert str(error).strip(), "an empty message"
    assert len(str(error).encode()) < 100_000, "an endless message"


def sound_plan() -> Plan:
    """Two stages of the shipped model."""
    spec = load_model_spec(str(MODEL))
    half = spec.num_layers // 2
    ends = [(0, half), (half, spec.num_layers)]
    return Plan.model_validate(
        {
            "model": spec.model_dump(),
            "workload": {"prompt_tokens": 16, "new_tokens": 4, "num_requests": 8},
            "cluster": {
                "nodes": [{"name": "node0", "devices": [{"type": "t4-16g", "count": 2}]}],
                "rehearse": {"t4-16g": {"slowdown": 2.0, "memory_mib": 300}},
            },
            "method": "hand",
            "batch": 4,
            "prefill_micro_batch": 1,
            "decode_micro_batch": 2,
            "stages": [
                {
                    "rank": rank,
                    "node": "node0",
                    "devices": ["t4-16g"],
                    "first_layer": first,
                    "end_layer": end,
                    "precisions": ["8", "16"] * ((end - first) // 2),
                }
                for rank, (first, end) in enumerate(ends)
            ],
        }
    )


def sound_prompts() -> bytes:
    """Token ids and texts; the command line takes both."""
    lines: list[dict[str, Any]] = [
        {"id": i, "prompt_token_ids": [i + 3, 5, 7], "max_new_tokens": 2} for i in range(4)
    ]
    lines += [{"id": f"text-{i}", "prompt": "Once upon é"} for i in range(4)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def sound_results(path: Path) -> tuple[bytes, bytes]:
    """An output and its journal."""
    with closing(Results(path, False, "never", RUN)) as results:
        for i in range(8):
            results.write(_finished(i if i % 2 else f"r{i}", i, 3, 2), f"text é {i}")
    return path.read_bytes(), path.with_name(f"{path.name}.journal").read_bytes()


def _finished(name: str | int, *token_ids: int) -> Finished:
    checksum = token_ids[0] if len(token_ids) > 1 else None  # lines of both kinds
    return Finished(Request(name, 0, (1, 2), 4, checksum), token_ids, "stop")
