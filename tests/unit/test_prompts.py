"""prompts.jsonl and out.jsonl: every fault with its line; torn outputs are continued."""

import json

import pytest

from llmpq.errors import UserError
from llmpq.runtime.batching import Request
from llmpq.runtime.prompts import Limits, ResultFile, read_requests

LIMITS = Limits(new_tokens=4, max_positions=10, vocab_size=50)
REQUESTS = [Request(f"r{i}", i, (1, 2), 4) for i in range(3)]


def read(tmp_path, *lines: str) -> list[Request]:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return read_requests(path, None, LIMITS)


def write(path, resume: bool, requests) -> set:
    """Writes results; returns the ids that were finished before."""
    results = ResultFile(path, resume)
    for request in requests:
        results.write(request, [3, 2], stopped=True, text="é")
    results.close()
    return results.finished


def ids(path) -> list:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_requests_keep_order_ids_and_limits(tmp_path):
    found = read(
        tmp_path,
        '{"id": "a", "prompt_token_ids": [1, 2]}',
        "",
        '{"id": 7, "prompt_token_ids": [3], "max_new_tokens": 2}',
    )
    assert found == [Request("a", 0, (1, 2), 4), Request(7, 1, (3,), 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected"),
        ('{"prompt_token_ids": [1]}', "'id' must be"),
        ('{"id": true, "prompt_token_ids": [1]}', "'id' must be"),
        ('{"id": "a"}', "give either"),
        ('{"id": "a", "prompt": "x", "prompt_token_ids": [1]}', "give either"),
        ('{"id": "a", "prompt": "x"}', "no tokenizer"),
        ('{"id": "a", "prompt_token_ids": []}', "at least one token"),
        ('{"id": "a", "prompt_token_ids": [1.5]}', "at least one token"),
        ('{"id": "a", "prompt_token_ids": [50]}', "outside the vocabulary of 50"),
        ('{"id": "a", "prompt_token_ids": [-1]}', "outside the vocabulary of 50"),
        ('{"id": "a", "prompt_token_ids": [1], "max_new_tokens": 0}', "positive integer"),
        ('{"id": "a", "prompt_token_ids": [1], "max_new_tokens": true}', "positive integer"),
        ('{"id": "a", "prompt_token_ids": [1, 1, 1, 1, 1, 1, 1]}', "10 positions"),
        ('{"id": "a", "prompt_token_ids": [1], "tokens": 3}', "unknown key 'tokens'"),
        ('{"id": "ok", "prompt_token_ids": [1]}', "was used on line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, '{"id": "ok", "prompt_token_ids": [1]}', line)
    assert str(caught.value).count("\n") == 0
    assert f"{tmp_path / 'in.jsonl'}:2: " in str(caught.value)
    assert message in str(caught.value)


def test_all_bad_lines_are_listed_and_a_long_list_is_cut(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, *["{"] * 30)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and ":20: " in lines[19] and "10 more" in lines[20]


def test_a_new_run_replaces_what_was_there_and_a_resumed_one_appends(tmp_path):
    path = tmp_path / "out" / "out.jsonl"
    assert write(path, False, REQUESTS[:2]) == set()
    assert write(path, True, REQUESTS[2:]) == {"r0", "r1"}
    assert ids(path) == ["r0", "r1", "r2"]
    write(path, False, REQUESTS[:1])
    assert ids(path) == ["r0"]


def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, False, REQUESTS)
    whole = path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        num_whole = sum(start <= cut for start in starts[1:])
        finished = write(path, True, REQUESTS[num_whole:])
        assert finished == {f"r{i}" for i in range(num_whole)}, cut
        assert path.read_bytes() == whole, cut


@pytest.mark.parametrize("broken", [b"{}\n", b'["id"]\n', b"5\n", b"\xff\xfe\n", b"\n", b"notes\n"])
def test_a_file_that_is_no_output_is_left_as_it_is(tmp_path, broken):
    path = tmp_path / "out.jsonl"
    write(path, False, REQUESTS[:1])
    before = path.read_bytes() + broken
    path.write_bytes(before)
    with pytest.raises(UserError, match=r"out.jsonl:2: not a result"):
        ResultFile(path, resume=True)
    assert path.read_bytes() == before


def test_two_runs_cannot_write_one_output(tmp_path):
    path = tmp_path / "out.jsonl"
    first = ResultFile(path, resume=False)
    with pytest.raises(UserError, match="another run is writing"):
        ResultFile(path, resume=True)
    first.close()
    ResultFile(path, resume=True).close()


def test_other_line_breaks_may_be_inside_a_prompt(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"id": 1, "prompt_token_ids": [5]}\n{"id": "\u2028", "prompt_token_ids": [6]}\n'
    )
    limits = Limits(new_tokens=4, max_positions=64, vocab_size=100)
    assert [r.prompt for r in read_requests(path, None, limits)] == [(5,), (6,)]


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out.jsonl: cannot be written"):
        ResultFile(tmp_path / "file" / "out.jsonl", resume=False)
