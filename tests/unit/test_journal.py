"""out.jsonl and its journal: nothing that was finished is lost, nothing is there twice."""

import json
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpq.errors import UserError, WorkerError
from llmpq.prompts.request import Finished, Request
from llmpq.prompts.result_lines import ResultWriter
from llmpq.reliability import journal
from llmpq.reliability.journal import Results

RUN = {"model": "tiny", "seed": 0}


def finished(
    name: str | int,
    *token_ids: int,
    error: str | None = None,
    checksum: int | None = None,
    is_chat: bool = False,
) -> Finished:
    reason = "stop" if error is None else "error"
    request = Request(name, 0, (1, 2), 4, checksum, is_chat)
    return Finished(request, token_ids or (3, 2), reason, error)


def write(
    path: Path, resume: bool, *names: str | int, run=RUN, fsync="never", text="é", **more
) -> Results:
    """Writes results; their `finished` are the ids that were there before, and these."""
    results = Results(path, resume, fsync, run, **more)
    with closing(results):
        for name in names:
            results.write(finished(name, checksum=(more.get("prompts") or {}).get(name)), text)
    return results


def write_failed(path: Path, resume: bool, *names: str | int, **more) -> Results:
    """Writes results of requests that failed."""
    results = Results(path, resume, "never", RUN, **more)
    with closing(results):
        for name in names:
            checksum = (more.get("prompts") or {}).get(name)
            results.write(finished(name, error=f"{name} is odd", checksum=checksum), "")
    return results


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path: Path) -> list:
    return [line["id"] for line in lines(path)]


def logged(path: Path) -> list:
    """The journal's ids; every checksum holds, and the header is first."""
    found = []
    for line in Path(f"{path}.journal").read_bytes().splitlines():
        assert line[:9] == b"%08x " % crc32(line[9:])
        found.append(json.loads(line[line.index(b"{") :]))
    assert found[0]["journal"] == 2
    return [line["id"] for line in found[1:]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "out.jsonl"


def test_a_line_has_all_that_is_promised(path):
    results = Results(path, False, "always", RUN)
    with closing(results):
        results.write(finished("a", 3, 4, 2), "é \u2028\n")
        results.write(finished(7, error="it was \ud800 bad"), "\\\ud800")
        assert results.finished == {"a", 7}
    assert path.read_bytes().count(b"\n") == 2
    first, second = [json.loads(line) for line in path.read_bytes().split(b"\n")[:2]]
    assert first == {
        "id": "a",
        "text": "é \u2028\n",
        "token_ids": [3, 4, 2],
        "num_prompt_tokens": 2,
        "num_new_tokens": 3,
        "finish_reason": "stop",
    }
    assert (second["finish_reason"], second["error"]) == ("error", "it was \ud800 bad")
    assert second["text"] == "\\\ud800"
    resumed = write(path, True, keeps_failed=True)
    assert resumed.finished == {"a", 7} and resumed.failed == {7} and resumed.notes == []


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
def test_a_resumed_run_appends(path, fsync):
    assert write(path, True, "r0", "r1", fsync=fsync).finished == {"r0", "r1"}
    results = write(path, True, "r2", fsync=fsync)
    assert results.finished == {"r0", "r1", "r2"} and results.notes == []
    assert ids(path) == logged(path) == ["r0", "r1", "r2"]


def test_a_new_run_keeps_what_was_there_under_another_name(path):
    write(path, False, "r0", "r1")
    results = write(path, False, "r2")
    assert ids(path) == logged(path) == ["r2"]
    assert "out.jsonl.old" in results.notes[0] and len(results.notes) == 1
    old = path.with_name("out.jsonl.old")
    assert ids(old) == ["r0", "r1"]
    # The pair that was moved can be taken up again.
    for ending in ("", ".journal"):
        Path(f"{path}{ending}.old").replace(f"{path}{ending}")
    assert write(path, True).finished == {"r0", "r1"}


def test_every_new_run_keeps_all_earlier_ones(path):
    for number in range(4):
        notes = write(path, False, f"r{number}").notes
    assert "out.jsonl.old.3" in notes[0]
    names = ["out.jsonl.old", "out.jsonl.old.2", "out.jsonl.old.3", "out.jsonl"]
    assert [ids(path.with_name(name)) for name in names] == [[f"r{i}"] for i in range(4)]
    # Either name of a pair that is taken takes the number.
    path.with_name("out.jsonl.journal.old.4").write_text("mine")
    write(path, False, "r4")
    assert ids(path.with_name("out.jsonl.old.5")) == ["r3"]
    assert path.with_name("out.jsonl.journal.old.4").read_text() == "mine"


def test_a_run_that_finished_nothing_moves_nothing(path):
    write(path, False, "r0")
    write(path, False)  # moves the first ones
    assert write(path, False).notes == []
    assert ids(path.with_name("out.jsonl.old")) == ["r0"]


def test_a_journal_whose_output_is_gone_is_kept_too(path):
    write(path, False, "r0")
    path.unlink()
    write(path, False, "r1")
    Path(f"{path}.journal.old").replace(f"{path}.journal")
    path.unlink()
    assert write(path, True).finished == {"r0"} and ids(path) == ["r0"]


def test_either_file_is_cut_anywhere(path):
    write(path, False, "r0", "r1", "r2")
    files = {name: name.read_bytes() for name in (path, Path(f"{path}.journal"))}
    for name, whole in files.items():
        for cut in range(len(whole) + 1):
            name.write_bytes(whole[:cut])
            assert write(path, True).finished == {"r0", "r1", "r2"}, cut
            for other, before in files.items():
                assert other.read_bytes() == before, cut


def test_without_a_journal_a_torn_line_alone_is_lost(path):
    write(path, False, "r0", "r1", "r2")
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        Path(f"{path}.journal").unlink()
        num_whole = sum(end <= cut for end in ends)  # the line feed itself may be missing
        expected = [f"r{i}" for i in range(num_whole)]
        rest = [f"r{i}" for i in range(num_whole, 3)]
        assert write(path, True, *rest).finished == {"r0", "r1", "r2"}
        assert path.read_bytes() == whole, cut
        assert logged(path) == [*expected, *rest]


@pytest.mark.parametrize("ending", [b"", b"\r", b" \t"])
def test_a_last_line_without_its_break_gets_one(path, ending):
    write(path, False, "r0", "r1")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + ending)
    write(path, True)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"\0" * 5000, b"\0\n\0\n", b"\xff\xfe" * 99, b"\n\n{}\n{"])
def test_garbage_at_the_ends_is_cut_off(path, damage):
    write(path, False, "r0", "r1")
    for name in (path, Path(f"{path}.journal")):
        with name.open("ab") as file:
            file.write(damage)
    results = write(path, True, "r2")
    assert ids(path) == logged(path) == ["r0", "r1", "r2"] and results.notes
    assert write(path, True).notes == []


def test_a_repeated_id_is_kept_once(path):
    write(path, False, "r0", "r1")
    Path(f"{path}.journal").unlink()
    with path.open("a") as file:
        again = lines(path)[0] | {"text": "later"}
        file.write(json.dumps(again) + "\n" + json.dumps(again | {"id": "r2"}) + "\n")
    results = write(path, True)
    assert [(line["id"], line["text"]) for line in lines(path)] == [
        ("r0", "é"),
        ("r1", "é"),
        ("r2", "later"),
    ]
    assert any("repeated lines of the same id dropped: 1" in note for note in results.notes)
    assert logged(path) == ["r0", "r1", "r2"]


def test_where_the_files_differ_the_journal_is_right(path):
    write(path, False, "r0", "r1")
    path.write_bytes(path.read_bytes().replace("é".encode(), b"xy", 1))
    results = write(path, True)
    assert [line["text"] for line in lines(path)] == ["é", "é"]
    assert any("differed" in note for note in results.notes)


def test_broken_lines_in_the_middle_are_put_aside(path):
    write(path, False, "r0", "r1")
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"my notes\n" + second[:-9] + b"\n" + second)
    results = write(path, True, "r2")
    assert ids(path) == ["r0", "r1", "r2"]
    broken = path.with_name("out.jsonl.broken").read_bytes()
    assert broken == b"my notes\n" + second[:-9] + b"\n"
    assert any("out.jsonl.broken" in note for note in results.notes)


@pytest.mark.parametrize(
    "content", [b"{}\n", b'["id"]\n', b"5\n", b"\xff\xfe\n", b"notes", b"PK\3\4", b'{"id": "a"}\n']
)
def test_a_wrong_file_is_left_as_it_is(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"out.jsonl:1: not a result of llmpq-run"):
        Results(path, True, "never", RUN)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"\n", b'{"id": "r0", "te', b'{"i', b"\0\0\0"])
def test_what_a_kill_before_the_first_result_leaves_is_fine(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    write(path, True, "r0")
    assert ids(path) == ["r0"]


def test_another_model_is_refused_and_other_settings_are_told(path):
    write(path, False, "r0")
    before = path.read_bytes()
    with pytest.raises(UserError, match="of model tiny, not of large; give another --output"):
        Results(path, True, "never", RUN | {"model": "large"})
    assert path.read_bytes() == before
    results = write(path, True, run=RUN | {"seed": 5, "stages": (1, 2)})
    assert results.notes == [
        f"{path}: finished requests had other settings: seed was 0, is 5, "
        "stages was None, is [1, 2]"
    ]
    assert write(path, True).notes == []  # what the first run was is not forgotten


def test_other_weights_are_refused_and_named(path):
    weights = {"config.json": "1", "a.safetensors": "2", "b.safetensors": "3"}
    write(path, False, "r0", run=RUN | {"weights": weights})
    other = {"config.json": "1", "a.safetensors": "9", "c.safetensors": "3"}
    words = "other weights: a.safetensors, b.safetensors, c.safetensors differ; give another"
    with pytest.raises(UserError, match=words):
        Results(path, True, "never", RUN | {"weights": other})
    assert write(path, True, run=RUN | {"weights": weights}).notes == []


def test_other_prompts_under_the_same_ids_are_refused_and_named(path):
    prompts = {f"r{i}": i for i in range(9)}
    write(path, False, *prompts, prompts=prompts)
    before = path.read_bytes()
    changed = {name: number + (number > 1) for name, number in prompts.items()}
    with pytest.raises(UserError, match="r2, r3, r4, r5, r6 and 2 more; give another --output"):
        Results(path, True, "never", RUN, changed)
    assert path.read_bytes() == before
    # What is to be done again may have another prompt.
    write_failed(path, False, "r0", "r1", prompts=prompts)
    assert write(path, True, "r0", prompts={"r0": 7, "r1": 8}).finished == {"r0"}
    with pytest.raises(UserError, match="than now: r0;"):
        Results(path, True, "never", RUN, {"r0": 8, "r1": 8})


def test_a_failure_that_is_kept_may_have_another_prompt(path):
    write_failed(path, False, "r0", prompts={"r0": 1})
    assert write(path, True, prompts={"r0": 2}, keeps_failed=True).failed == {"r0"}


def test_a_journal_of_the_first_version_is_taken_up(path):
    write(path, False, "r0")
    log = Path(f"{path}.journal")
    rest = log.read_bytes().split(b"\n", 1)[1]
    header = json.dumps({"journal": 1, "run": RUN}).encode()
    log.write_bytes(b"%08x %s\n" % (crc32(header), header) + rest)
    now = RUN | {"weights": {"a": "1"}}
    results = write(path, True, "r1", run=now, prompts={"r0": 1, "r1": 2})
    assert results.finished == {"r0", "r1"} and ids(path) == ["r0", "r1"]
    assert any("whose prompts are not recorded" in note for note in results.notes)
    with pytest.raises(UserError, match="of model tiny"):
        Results(path, True, "never", now | {"model": "large"})


def test_results_without_a_checksum_of_their_prompt_are_told(path):
    write(path, False, "r0")
    results = write(path, True, "r1", prompts={"r0": 5, "r1": 6})
    assert any("whose prompts are not recorded: 1" in n for n in results.notes)
    assert results.finished == {"r0", "r1"}


def test_results_that_no_prompt_asks_for_are_set_aside(path):
    write(path, False, "r0", "stranger", "r1")
    with path.open("a") as file:
        file.write(json.dumps(lines(path)[0] | {"id": "made up"}) + "\n")
    results = write(path, True, "r2", prompts={"r0": 0, "r1": 1, "r2": 2})
    assert ids(path) == logged(path) == ["r0", "r1", "r2"]
    assert ids(path.with_name("out.jsonl.aside")) == ["stranger", "made up"]
    assert any("no prompt has, moved to out.jsonl.aside: 2" in note for note in results.notes)
    again = write(path, True, prompts={"r0": 0, "r1": 1, "r2": 2})
    assert not any("aside" in note for note in again.notes)


# ---- failed requests


def test_a_failed_request_is_done_again_and_its_line_replaced(path):
    write(path, False, "r0")
    write_failed(path, True, "r1", "r2")
    results = Results(path, True, "never", RUN)
    with closing(results):
        assert results.finished == {"r0"} and results.failed == set()
        assert any("tried again: 2" in note for note in results.notes)
        assert ids(path) == ["r0"]  # no id is there twice at any moment
        results.write(finished("r1"), "now")
        results.write(finished("r2", error="still odd"), "")
        assert results.failed == {"r2"}
    assert [(line["id"], line.get("error")) for line in lines(path)] == [
        ("r0", None),
        ("r1", None),
        ("r2", "still odd"),
    ]
    kept = write(path, True, keeps_failed=True)
    assert (kept.finished, kept.failed, kept.notes) == ({"r0", "r1", "r2"}, {"r2"}, [])


def test_failures_that_were_to_be_tried_again_come_back_from_the_journal(path):
    write_failed(path, False, "r0", "r1")
    write(path, True)  # ended before it tried them
    assert ids(path) == []
    results = write(path, True, keeps_failed=True)
    assert ids(path) == ["r0", "r1"] and results.failed == {"r0", "r1"}
    assert [line["error"] for line in lines(path)] == ["r0 is odd", "r1 is odd"]


def test_a_retried_request_is_cut_off_anywhere(path):
    """After a kill at any byte either the failure or the result counts, and no line is lost."""
    write_failed(path, False, "r0", "r1")
    write(path, True, "r0")
    log = Path(f"{path}.journal")
    whole, shown = log.read_bytes(), path.read_bytes()
    start = whole.rindex(b"\n", 0, len(whole) - 1) + 1  # of the result of r0
    for cut in range(start, len(whole) + 1):
        log.write_bytes(whole[:cut])
        path.write_bytes(b"")  # as the output comes after the journal
        is_whole = cut >= len(whole) - 1
        results = write(path, True, keeps_failed=True)
        assert results.failed == ({"r1"} if is_whole else {"r0", "r1"}), cut
        assert sorted(ids(path)) == ["r0", "r1"]
    # A result that reached the output alone is no failure because of an older journal.
    log.write_bytes(whole[:start])
    path.write_bytes(shown)
    results = write(path, True)
    assert results.finished == {"r0"} and ids(path) == ["r0"]
    assert write(path, True, keeps_failed=True).failed == {"r1"}
    assert write(path, True, "r1").finished == {"r0", "r1"}


def test_a_result_counts_before_a_failure_of_the_same_id(path):
    write_failed(path, False, "r0")
    failure = path.read_text()
    write(path, True, "r0")
    path.write_text(failure + path.read_text() + failure)
    Path(f"{path}.journal").unlink()
    results = write(path, True)
    assert results.finished == {"r0"} and ids(path) == ["r0"] == logged(path)
    assert any("repeated lines of the same id dropped: 2" in note for note in results.notes)


# ---- other programs


@pytest.mark.parametrize("ending", ["", ".journal"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_removed_or_replaced_ends_the_run(path, monkeypatch, ending, replaced):
    monkeypatch.setattr(journal, "CHECK_EVERY_S", 0.0)
    victim = Path(f"{path}{ending}")
    with closing(Results(path, False, "never", RUN)) as results:
        results.write(finished("r0"), "é")
        victim.unlink()
        if replaced:
            victim.write_text("mine\n")
        what = "is another file" if replaced else "is gone"
        with pytest.raises(WorkerError, match=f"{victim.name}: {what}.*--resume restores it"):
            results.write(finished("r1"), "é")
        with pytest.raises(WorkerError, match=what):
            results.check_files()
    assert write(path, True).finished == {"r0"} and ids(path) == logged(path) == ["r0"]


def test_both_files_removed_is_not_called_safe(path):
    with closing(Results(path, False, "never", RUN)) as results:
        results.write(finished("r0"), "é")
        path.unlink()
        Path(f"{path}.journal").unlink()
        with pytest.raises(WorkerError, match="results of this run are in neither file"):
            results.check_files()


def test_a_file_that_others_write_to_or_cut_ends_the_run(path):
    for size in (5, 500):
        with closing(Results(path, False, "never", RUN)) as results:
            results.write(finished("r0"), "é")
            os.truncate(path, size)
            with pytest.raises(WorkerError, match=f"has {size} bytes and not"):
                results.write(finished("r1"), "é")
        assert write(path, True).finished == {"r0", "r1"}


# ---- OpenAI's form


def test_results_in_openais_form_are_resumed_and_not_mixed(path):
    writer = ResultWriter("openai", "tiny")
    with closing(Results(path, False, "never", RUN, writer=writer)) as results:
        results.write(finished("r0", is_chat=True), "é")
        results.write(finished("r1", error="odd"), "")
    first, second = lines(path)
    assert (first["custom_id"], first["error"]) == ("r0", None)
    body = first["response"]["body"]
    assert first["response"]["status_code"] == 200 and body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "é"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert second["response"]["status_code"] == 500
    assert second["error"]["message"] == second["response"]["body"]["error"]["message"] == "odd"
    assert len({first["id"], second["id"]}) == 2
    with pytest.raises(UserError, match="format openai, not of llmpq; give that --output-format"):
        Results(path, True, "never", RUN)
    Path(f"{path}.journal").unlink()
    with pytest.raises(UserError, match="format openai, not of llmpq; give that --output-format"):
        Results(path, True, "never", RUN)
    resumed = write(path, True, "r1", writer=writer)
    assert resumed.finished == {"r0", "r1"}
    assert [line["custom_id"] for line in lines(path)] == ["r0", "r1"]


# ---- models


def test_a_run_that_finished_nothing_binds_no_model(path):
    write(path, False)
    assert write(path, True, "r0", run={"model": "large"}).notes == []
    with pytest.raises(UserError, match="of model large"):
        Results(path, True, "never", RUN)


def test_failures_alone_bind_no_model_and_no_weights(path):
    run = RUN | {"weights": {"a": "1"}}
    with closing(Results(path, False, "never", run)) as results:
        results.write(finished("r0", error="odd"), "")
    mended = RUN | {"model": "large", "weights": {"a": "2"}}
    with pytest.raises(UserError, match="of model tiny"):
        Results(path, True, "never", mended, keeps_failed=True)
    assert write(path, True, "r0", run=mended).finished == {"r0"}
    assert not any("other settings" in note for note in write(path, True, run=mended).notes)


def test_a_damaged_header_is_said_and_replaced(path):
    write(path, False, "r0")
    log = Path(f"{path}.journal")
    log.write_bytes(b"x" + log.read_bytes()[1:])
    assert any("are not recorded" in note for note in write(path, True).notes)
    assert write(path, True).notes == [] and logged(path) == ["r0"]


def test_two_runs_cannot_write_one_output(path):
    with closing(Results(path, False, "never", RUN)) as first:
        for resume in (False, True):
            with pytest.raises(UserError, match="another run is writing"):
                Results(path, resume, "never", RUN)
        first.write(finished("r0"), "")
    # Mending replaces the file, and the lock goes with it.
    with path.open("a") as file:
        file.write("{\n" + path.read_text())
    with (
        closing(Results(path, True, "never", RUN)),
        pytest.raises(UserError, match="another run is writing"),
    ):
        Results(path, True, "never", RUN)
    assert write(path, True).finished == {"r0"}


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in {
        "file/out.jsonl": "file/out.jsonl: cannot be written",
        "loop": "loop: cannot be written",
        "": "is a directory|cannot be written",
        "pipe": "is not a regular file",
    }.items():
        with pytest.raises(UserError, match=message):
            Results(tmp_path / name, False, "never", RUN)


def test_a_link_stays_a_link(tmp_path, path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    write(link, False, "r0", "r1")
    path.write_bytes(path.read_bytes().replace(b"stop", b"stun", 1))
    assert write(link, True).finished == {"r0", "r1"}
    assert link.is_symlink() and sorted(ids(link)) == ["r0", "r1"]


def test_the_policies_sync_as_often_as_they_say(path, monkeypatch):
    counts = {}
    sync = os.fsync
    monkeypatch.setattr(journal, "SYNC_EVERY_S", 0.01)
    for fsync in ("always", "interval", "never"):
        calls = []
        monkeypatch.setattr(
            os, "fsync", lambda handle, calls=calls: (calls.append(1), sync(handle))
        )
        with closing(Results(path, False, fsync, RUN)) as results:
            before = len(calls)
            for i in range(5):
                results.write(finished(i), "")
            deadline = time.monotonic() + 60
            while fsync == "interval" and len(calls) == before and time.monotonic() < deadline:
                time.sleep(0.01)
            counts[fsync] = len(calls) - before
    assert counts["always"] == 5 and counts["never"] == 0
    assert counts["interval"] >= 1


def test_a_sync_that_fails_in_the_background_ends_the_run(path, monkeypatch):
    monkeypatch.setattr(journal, "SYNC_EVERY_S", 0.01)
    results = Results(path, False, "interval", RUN)
    with monkeypatch.context() as patched:

        def fail(handle: int) -> None:
            raise OSError(5, "Input/output error")

        patched.setattr(os, "fsync", fail)
        with pytest.raises(WorkerError, match="Input/output error"):
            for i in range(6000):
                results.write(finished(i), "")
                time.sleep(0.01)
    results.close()


RESULT = st.tuples(st.text(max_size=3) | st.integers(0, 99), st.text(max_size=8), st.booleans())


@st.composite
def damaged(draw: st.DrawFn, size: int) -> tuple[int, list[tuple[int, int]]]:
    """Where a file is cut, and its bytes that change to what."""
    cut = draw(st.integers(0, size))
    flips = st.tuples(st.integers(0, max(size - 1, 0)), st.integers(0, 255))
    return (cut, []) if draw(st.booleans()) else (size, draw(st.lists(flips, max_size=6)))


@settings(
    deadline=None,
    max_examples=200,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data(), st.lists(RESULT, max_size=8, unique_by=lambda result: result[0]), st.booleans())
def test_any_damage_to_one_file_loses_nothing(tmp_path, data, results, hits_journal):
    path = Path(tempfile.mkdtemp(dir=tmp_path)) / "out.jsonl"
    write(path, False)
    for name, text, failed in results:
        with closing(Results(path, True, "never", RUN, keeps_failed=True)) as writer:
            writer.write(finished(name, error="bad" if failed else None), text)
    before = {line["id"]: line for line in map(json.loads, path.read_bytes().split(b"\n")[:-1])}
    target = Path(f"{path}.journal") if hits_journal else path
    content = bytearray(target.read_bytes())
    cut, flips = data.draw(damaged(len(content)))
    for place, value in flips:
        content[place : place + 1] = [value]
    target.write_bytes(content[:cut])

    resumed = write(path, True, keeps_failed=True)
    after = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert len({line["id"] for line in after}) == len(after) == len(resumed.finished)
    kept = {line["id"]: line for line in after}
    assert {name: kept.get(name) for name in before} == before
    assert not write(path, True, keeps_failed=True).notes
