"""Damaged plans, prompts, outputs and journals: a message or a value, and no result lost.

The damages are those of scripts/bench/_engine_fuzz.py; here hypothesis chooses and shrinks them.
Always the same examples, unless LLMPQ_FUZZ_EXAMPLES=5000 asks for more, and new ones.
"""

import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpq.errors import UserError
from llmpq.plan import load_plan

pytest.importorskip("torch")  # the command line's own reading of a model's folder

EXAMPLES = os.environ.get("LLMPQ_FUZZ_EXAMPLES")
fuzzed = settings(
    deadline=None,
    max_examples=int(EXAMPLES or "150"),
    derandomize=EXAMPLES is None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
chances = st.randoms(use_true_random=False)


def load_fuzz() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "_engine_fuzz.py"
    spec = importlib.util.spec_from_file_location("engine_fuzz", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["engine_fuzz"] = module
    spec.loader.exec_module(module)
    return module


FUZZ = load_fuzz()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory):
    return FUZZ.Cases(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", ["plan", "prompts", "results"])
@fuzzed
@given(rng=chances)
def test_damaged_files_give_messages_and_lose_nothing(cases, kind: str, rng: random.Random):
    assert cases.case(kind, rng, number=FUZZ.CLI_EVERY - 1)() == []


@pytest.mark.parametrize("kind", ["plan", "prompts"])
@settings(fuzzed, max_examples=8)
@given(rng=chances)
def test_the_command_line_gives_messages_too(cases, kind: str, rng: random.Random):
    assert cases.case(kind, rng, number=0)() == []


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("batch",), 10**30, "an integer of 31 digits"),
        (("batch",), 10**9, "batch: input should be less than or equal to"),
        (("workload", "prompt_tokens"), 10**300, "an integer of 301 digits"),
        (("model", "linears"), [], "model.linears is empty"),
        (("model", "name"), "\ud800", "half a character"),
        (("stages", 1, "node"), "\ud800", "half a character"),
    ],
)
def test_what_was_found_stays_mended(tmp_path: Path, keys, value, message: str):
    plan = json.loads(FUZZ.sound_plan().model_dump_json())
    place = plan
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=message):
        load_plan(path)


@fuzzed
@given(data=st.binary(max_size=200), more=st.binary(max_size=200))
def test_files_of_any_bytes(tmp_path: Path, data: bytes, more: bytes):
    path = tmp_path / "any"
    path.write_bytes(data)
    assert FUZZ.read_plan(path) == FUZZ.read_prompts(path, is_chat=True) == []
    assert FUZZ.resume_results(tmp_path / "out.jsonl", data, more, b"") == []


def test_the_fuzzer_sees_what_goes_wrong(monkeypatch):
    """A reader that raises, and one that forgets results."""
    assert FUZZ.fuzz(8, seed=0).failures == []

    def fail(path: Path) -> None:
        raise KeyError("stages")

    monkeypatch.setattr(FUZZ, "load_plan", fail)
    monkeypatch.setattr(FUZZ, "resume_results", lambda *_, sound: ["a line"])
    found = FUZZ.fuzz(8, seed=0)
    assert (found.num_examples, found.num_tracebacks, found.num_lost) == (8, 1, 4)
    assert "KeyError" in "".join(found.failures) and found.longest_s > 0


def test_sound_lines_in_either_file_are_expected_of_a_resumed_run(cases):
    shown, logged = cases.sound_results
    lines = shown.split(b"\n")[:-1]
    assert FUZZ.intact(shown, b"", shown) == FUZZ.intact(b"", logged, shown) == lines
    assert FUZZ.intact(shown[:-9], b"", shown) == lines[:-1]
    assert FUZZ.intact(lines[0].replace(b"text", b"next"), b"", shown) == []
