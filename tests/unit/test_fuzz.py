"""Damaged inputs of all commands: a message or a value, and no result lost.

The damages are those of scripts/bench/_damage.py. For plans, prompts, outputs and journals
hypothesis chooses and shrinks them; for the inputs of whole commands `scripts/fuzz.py` does, of
whose cases a few are run here.
Always the same examples, unless LLMPQ_FUZZ_EXAMPLES=5000 asks for more, and new ones.
"""

import json
import os
import random
from pathlib import Path

import _engine_fuzz as FUZZ
import _fuzz_inputs
import fuzz
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpq.errors import UserError
from llmpq.plan_data import load_plan

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


# ---- whole commands


BY_HAND = [
    kind
    for kind in _fuzz_inputs.KINDS
    if kind.name.startswith(
        ("plan ", "run prompts", "run model/config", "eval quantize", "eval in")
    )
    and not kind.file.startswith(("profiles", "sensitivity"))
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that need no command to make them."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _fuzz_inputs.write_by_hand()
    return folder


def outcome_of(case: "fuzz.Case", sound: Path, place: Path) -> "fuzz.Outcome":
    """As fuzz.py runs it, but in this process and without a limit of time."""
    fuzz.set_up(case, sound, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        command, words = _fuzz_inputs.command_of(case.kind.command)
        result = CliRunner().invoke(command, words)
    escaped = result.exception
    code = result.exit_code if escaped is None or isinstance(escaped, SystemExit) else 70
    return fuzz.Outcome(case, code, 0.0, f"{result.output} {escaped!r}")


@pytest.mark.parametrize("kind", BY_HAND, ids=lambda kind: kind.name)
def test_a_few_damaged_inputs_of_every_kind(kind, sound, tmp_path):
    whole = fuzz.Case(-1, kind, "", (sound / kind.file).read_bytes())
    assert outcome_of(whole, sound, tmp_path / "whole").code == 0
    for number in range(2):
        case = fuzz.make_case(number, 1, sound, [kind])
        outcome = outcome_of(case, sound, tmp_path / str(number))
        assert outcome.faults == [], (case.what, outcome.said)


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("eval quantize_config.json", '"bits": 4', f'"bits": "{"x" * 5000}"', "weights of 'xxx"),
        ("eval quantize_config.json", '"bits": 4', '"bits": 4.0', "weights of 4.0 bits"),
        ("eval quantize_config.json", '": 64', '": 1e308', "'group_size' must be an integer"),
        ("eval quantize_config.json", '"sym": true', '"sym": 1', "'sym' must be true or false"),
        ("eval quantize_config.json", '_act": false', '_act": []', "'desc_act' must be true or"),
        (
            "run model/config.json",
            "10000.0",
            '""',
            "rope_theta' is '', which no model can have",
        ),
        ("plan model/config.json", '": true', f'": "{"x" * 5000}"', "must be true or false: 'xx"),
        ("run prompts.jsonl", "[3, 5]", f"[3, {'9' * 300}]", "token 99999"),
        ("run model/config.json", '"llama"', "[]", "has no models of type []"),
        ("eval index.json", '"a.safetensors"', f'"{"x" * 5000}"', "is not the name of a file"),
        ("eval index.json", '"a.safetensors"', '"../a.safetensors"', "is not the name of a file"),
        ("plan cluster.yaml", "name: lab", 'name: "\\ud800"', "contains a lone surrogate"),
        ("plan cluster.yaml", "name: lab", 'name: "\\U0000dfff"', "contains a lone surrogate"),
        (
            "plan workload.yaml",
            "max: 9",
            f"max: {10**300}",
            "prompt_tokens.max: input should be less",
        ),
        ("eval config.json", '_layers": 8', '_layers": 9999999999', "the most that llmpq takes"),
        ("plan workload.yaml", "new_tokens: 4", "new_tokens: 900", "900 new ones exceeds"),
        ("plan workload.yaml", "batch: 4", "batch: 1000000000", "batch: input should be less"),
        ("run model/model.safetensors", '"BF16"', f'"{"x" * 5000}"', "not a readable safetensors"),
        ("run model/model.safetensors", '"BF16"', '"1"', "not a readable safetensors"),
        ("plan cluster.yaml", "_gbs: 1.25", "_gbs: 1.25e9", "link.bandwidth_gbs: input should be"),
        ("plan cluster.yaml", "latency_us: 50", "latency_us: 5.0e+10", "link.latency_us: input"),
    ],
)
def test_what_the_script_found_stays_mended(sound, tmp_path, kind, old, new, message):
    [kind] = [one for one in _fuzz_inputs.KINDS if one.name == kind]
    content = (sound / kind.file).read_bytes()
    assert old.encode() in content
    damaged = content.replace(old.encode(), new.encode(), 1)
    if kind.form == "safetensors":  # the length of the header comes first
        size = int.from_bytes(content[:8], "little") + len(new) - len(old)
        damaged = size.to_bytes(8, "little") + damaged[8:]
    case = fuzz.Case(0, kind, new, damaged)
    outcome = outcome_of(case, sound, tmp_path)
    assert outcome.code == 2 and outcome.faults == [] and message in outcome.said, outcome.said


def test_what_is_not_sound_is_seen(sound, tmp_path):
    case = fuzz.Case(0, _fuzz_inputs.KINDS[0], "", b"")
    assert fuzz.Outcome(case, 2, 0.1, "error: cluster.yaml: is empty").faults == []
    for code, seconds, said in (
        (70, 0.1, "Traceback (most recent call last):"),
        (1, 0.1, "error: cluster.yaml: odd"),
        (-11, 0.1, "error: cluster.yaml: odd"),
        (2, 20.5, "error: cluster.yaml: odd"),
        (2, 0.1, "error: odd"),
        (2, 0.1, ""),
        (2, 0.1, f"error: cluster.yaml: {'x' * 300}"),
        (2, 0.1, "error: cluster.yaml: odd\n" * 30),
    ):
        assert fuzz.Outcome(case, code, seconds, said).faults, (code, seconds, said)
