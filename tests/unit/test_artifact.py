"""Reading and writing files: every fault is one `UserError` with file and line, no traceback."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmpq.artifact import (
    MAX_FAULTS,
    Provenance,
    Strict,
    parse_json,
    read_json,
    read_text,
    read_yaml,
    write_json,
    write_text,
)
from llmpq.cluster import Cluster
from llmpq.errors import LlmpqError, UserError
from llmpq.plan_data import Baseline, Plan
from llmpq.profile_data import Profile, Sensitivity
from llmpq.workload import Workload

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
KINDS = [Cluster, Workload, Plan, Profile, Sensitivity]


class Inner(Strict):
    size: int = 1
    lengths: list[int] = []


class Outer(Strict):
    name: str
    inner: Inner = Inner()
    by_type: dict[str, Inner] = {}
    ratio: float = 1.0


def fault(path: Path, text: str | bytes, kind: type[Strict] = Outer) -> str:
    """The message that reading a file with this text gives."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        (read_yaml if path.suffix == ".yaml" else read_json)(path, kind)
    str(caught.value).encode("utf-8", errors="strict")  # a terminal can print it
    return str(caught.value).replace(str(path), path.name)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", "", "a.json:1: not valid JSON"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\n", "a.json: a Git LFS pointer"),
        ("a.json", '{"name": "x"\n"ratio": 1}', "a.json:2: not valid JSON"),
        ("a.json", "[1, 2]", "a.json: expected keys and values, found [1, 2]"),
        ("a.json", "null", "expected keys and values, found None"),
        ("a.json", b"\xff\xfe", "a.json: not UTF-8 text (byte 0)"),
        ("a.json", '{"name": ' + "9" * 5000 + "}", "a.json: not valid JSON"),
        ("a.json", "[" * 100_000, "a.json: not valid JSON: nested too deeply"),
        ("a.json", '{"name": "x", "ratio": NaN}', "a.json:1: ratio: input should be a finite"),
        ("a.json", '{"name": "x", "ratio": 1e999}', "a.json:1: ratio: input should be a finite"),
        ("a.json", '{"\\ud800": 1}', "a.json: the file: input should be a valid string"),
        ("a.json", '{"name": "x", "by_type": {"\\ud800": 1}}', "a.json"),
        ("a.yaml", "", "a.yaml: expected keys and values, found None"),
        ("a.yaml", "just text", "a.yaml: expected keys and values, found 'just text'"),
        ("a.yaml", "name: [1", "a.yaml:1: not valid YAML"),
        ("a.yaml", "name: x\n  ratio: 2", "a.yaml:2: not valid YAML"),
        ("a.yaml", "name: x\nratio: !!bool perhaps", "a.yaml: not valid YAML"),
        ("a.yaml", "name: !!int ''", "a.yaml: not valid YAML"),
        ("a.yaml", "name: !!timestamp x", "a.yaml: not valid YAML"),
        ("a.yaml", "name: !!python/object:os.system x", "a.yaml:1: not valid YAML"),
        ("a.yaml", "name: 2026-99-99", "a.yaml: not valid YAML"),
        ("a.yaml", "[" * 100_000, "a.yaml: not valid YAML: nested too deeply"),
        ("a.yaml", "&a [*a]", "a.yaml: expected keys and values"),
        ("a.yaml", "ratio: 2", "a.yaml:1: 'name' is missing"),
        ("a.yaml", "name: x\nnaem: y", "a.yaml:2: unknown key 'naem'; known here: name, inner"),
        ("a.yaml", "name: x\n3: y", "a.yaml:2: "),
        ("a.yaml", "name: x\ninner:\n  size: big", "a.yaml:3: inner.size: input should be"),
        ("a.yaml", "name: x\ninner:\n  lengths:\n  - 1\n  - b", "a.yaml:5: inner.lengths.1: "),
        ("a.yaml", "name: x\nby_type:\n  T4:\n    size: a", "a.yaml:4: by_type.T4.size: "),
        ("a.yaml", "name: x\nby_type:\n  int:\n    size: a", "a.yaml:4: by_type.int.size: "),
    ],
)
def test_faults(tmp_path: Path, name: str, text: str | bytes, expected: str) -> None:
    assert expected in fault(tmp_path / name, text)


def test_all_faults_at_once(tmp_path: Path) -> None:
    message = fault(tmp_path / "a.yaml", "ratio: x\ninner:\n  size: y\nextra: 1\n")
    lines = message.splitlines()
    assert len(lines) == 4 and all(line.startswith("a.yaml:") for line in lines)
    assert {line.split(":")[1] for line in lines} == {"1", "3", "4"}


def test_many_faults_are_cut_short(tmp_path: Path) -> None:
    lengths = json.dumps({"name": "x", "inner": {"lengths": ["a"] * 5000}}, indent=1)
    lines = fault(tmp_path / "a.json", lengths).splitlines()
    assert len(lines) == MAX_FAULTS + 1
    assert lines[-1] == f"a.json: and {5000 - MAX_FAULTS} more faults"


def test_aliases_that_unfold_without_end_are_shown_in_short(tmp_path: Path) -> None:
    rows = ["- &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert len(fault(tmp_path / "a.yaml", "\n".join(rows))) < 200
    text = "name: &n\n" + "\n".join("  " + row for row in rows) + "\nratio: *n\n"
    assert len(fault(tmp_path / "a.yaml", text)) < 400


@pytest.mark.parametrize("read", [read_text, parse_json])
def test_unreadable(tmp_path: Path, read: Any) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "absent.json")
    with pytest.raises(UserError, match="is a directory"):
        read(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / ("x" * 5000))


def test_write_and_read_back(tmp_path: Path) -> None:
    value = Outer(name="é", inner=Inner(size=3), by_type={"T4": Inner(lengths=[1, 2])})
    path = tmp_path / "new" / "a.json"
    write_json(path, value)
    assert read_json(path, Outer) == value
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["a.json"], "nothing temporary stays"


def test_what_is_absent_is_written_as_null_and_read_back(tmp_path: Path) -> None:
    value = Baseline(method="uniform", feasible=False)
    write_json(tmp_path / "b.json", value)
    assert '"tokens_per_s": null' in (tmp_path / "b.json").read_text()
    assert read_json(tmp_path / "b.json", Baseline) == value


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(UserError, match="cannot be written"):
        write_text(path / "below-a-file", "text")


def test_values_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer(name="x").name = "y"


def test_provenance_says_when_and_where() -> None:
    here = Provenance.here(device="cpu")
    assert here.tool == "llmpq" and here.version and here.host and here.device == "cpu"
    assert here.created.endswith("+00:00")


# -- whatever a file holds, reading it is an answer or a `UserError` ---------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**400)
    | st.floats()
    | st.text(max_size=8)
)
FIELDS = sorted({field for kind in KINDS for field in kind.model_fields})
INNER_KEYS = ["devices", "type", "count", "memory_gib", "min", "max", "trace", "link", "rank"]
keys = st.sampled_from(FIELDS + INNER_KEYS) | st.text(max_size=4)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=25,
)
files = st.dictionaries(keys, values, max_size=8)
anything = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def read_or_user_error(path: Path, kind: type[Strict]) -> None:
    """Passes if reading ends in a value or in a message that a terminal can print."""
    try:
        (read_yaml if path.suffix == ".yaml" else read_json)(path, kind)
    except LlmpqError as error:
        assert isinstance(error, UserError)
        assert str(path) in str(error)
        str(error).encode("utf-8", errors="strict")


@pytest.mark.parametrize("kind", KINDS)
@anything
@hypothesis.given(data=files | values)
def test_any_json(tmp_path: Path, kind: type[Strict], data: Any) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps(data, indent=1))
    read_or_user_error(path, kind)


@pytest.mark.parametrize("kind", KINDS)
@anything
@hypothesis.given(data=files)
def test_any_json_as_yaml(tmp_path: Path, kind: type[Strict], data: Any) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8", errors="replace")
    read_or_user_error(path, kind)


@anything
@hypothesis.given(text=st.text() | st.text(alphabet="!&*[]{}:-?|>'\"#%@`, \n01xa"))
def test_any_text(tmp_path: Path, text: str) -> None:
    for name in ("any.json", "any.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8", errors="replace")
        read_or_user_error(tmp_path / name, Cluster)


@anything
@hypothesis.given(data=st.binary(max_size=60))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    for name in ("any.json", "any.yaml"):
        (tmp_path / name).write_bytes(data)
        read_or_user_error(tmp_path / name, Workload)


# -- files as other systems and people write them ----------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("text", ['{"name": "é",\r\n "ratio": 2}', "name: é\r\nratio: 2\r\n"])
def test_a_byte_order_mark_is_skipped(tmp_path: Path, encoding: str, text: str) -> None:
    path = tmp_path / ("a.json" if text.startswith("{") else "a.yaml")
    mark = "\ufeff" if encoding.endswith("be") else ""
    path.write_bytes((mark + text).encode(encoding))
    read = read_json if path.suffix == ".json" else read_yaml
    assert read(path, Outer) == Outer(name="é", ratio=2)
    assert read_text(path) == text.replace("\r\n", "\n")
    # Faults are found on the right line all the same.
    path.write_bytes((mark + text.replace("ratio", "ratoi")).encode(encoding))
    with pytest.raises(UserError, match=rf"{path.name}:2: unknown key 'ratoi'"):
        read(path, Outer)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.json",
            '{"name": "x",\n"name": "y"}',
            "a.json:2: not valid JSON: the key 'name' occurs",
        ),
        ("a.json", '{"name": "x", "inner":\n{"size": 1,\n\n"size": 1}}', "a.json:4: not valid"),
        ("a.json", '{"name": "x", "by_type": {"a": {}, "b": {}, "a": {}}}', "the key 'a' occurs"),
        ("a.yaml", "name: x\nratio: 1\nname: y", "a.yaml:3: not valid YAML: the key 'name' occurs"),
        ("a.yaml", "name: x\ninner:\n  size: 1\n  size: 1", "a.yaml:4: not valid YAML"),
        ("a.yaml", "name: x\ninner: {size: 1, size: 2}", "a.yaml:2: not valid YAML"),
    ],
)
def test_a_key_that_is_there_twice(tmp_path: Path, name: str, text: str, expected: str) -> None:
    assert expected in fault(tmp_path / name, text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.json",
            '{"name": "x",\n"ratio": "2"}',
            "a.json:2: ratio: expected a number (found '2')",
        ),
        ("a.json", '{"name": "x",\n"ratio": true}', "a.json:2: ratio: expected a"),
        ("a.yaml", "name: x\ninner:\n  size: '3'", "a.yaml:3: inner.size: expected a number"),
        ("a.yaml", "name: x\ninner:\n  size: yes", "a.yaml:3: inner.size: expected a number"),
        ("a.yaml", "name: x\ninner:\n  lengths: [1,\n   true]", "a.yaml:4: inner.lengths.1: expec"),
        ("a.yaml", "name: x\nby_type:\n  T4: {size: '1'}", "a.yaml:3: by_type.T4.size: expected"),
    ],
)
def test_nothing_is_taken_for_a_number_that_is_none(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    assert expected in fault(tmp_path / name, text)


def test_several_values_of_the_wrong_sort_are_told_at_once(tmp_path: Path) -> None:
    lines = fault(tmp_path / "a.yaml", "name: x\nratio: '1'\ninner:\n  size: true").splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "4"]


def test_a_merge_is_no_repeated_key_and_whole_numbers_may_have_a_point(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: x\nby_type:\n  a: &a {size: 2.0}\n  b: {<<: *a, lengths: [3.0]}\n")
    found = read_yaml(path, Outer)
    assert (found.by_type["b"].size, found.by_type["b"].lengths) == (2, [3])


def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it would wait for ever
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (pipe, Path("/dev/zero")):
        for read in (read_text, parse_json, lambda p: read_yaml(p, Outer)):
            with pytest.raises(UserError, match="is not a regular file"):
                read(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_text(loop)


def test_a_file_far_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: nothing of it is on the disk
    for read in (read_text, parse_json, lambda p: read_yaml(p, Outer)):
        with pytest.raises(UserError, match="has 1048576 MiB; a file of this kind has"):
            read(path)
