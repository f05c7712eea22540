"""What a run tells: its report, its trace, its progress."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from jobs import Job

from llmpq.cli.run import main
from llmpq.prompts.request import Finished, Request
from llmpq.runtime.collector import Collector
from llmpq.runtime.leader import Status

NEW_TOKENS = 20


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_tales) -> Job:
    """One that has run in this process, on one stage."""
    job = Job(tmp_path_factory.mktemp("run"), tiny_tales)
    command = job.command([], job.plan([8], batch=4, p=2, q=2), "--dtype", "float32")
    done = CliRunner().invoke(main, [*command, "--trace", str(job.folder / "trace.json")])
    assert done.exit_code == 0, done.output
    return job


def test_the_trace_holds_every_call_of_the_report(job):
    report = json.loads(job.report.read_text())
    events = json.loads((job.folder / "trace.json").read_text())["traceEvents"]
    calls = [event for event in events if event["ph"] == "X"]
    (stage,) = report["stages"]
    for phase in ("prefill", "decode"):
        mine = [event for event in calls if event["cat"] == phase]
        assert len(mine) == sum(m["count"] for m in stage["measured"] if m["phase"] == phase) > 0
        total_s = sum(event["dur"] for event in mine) / 1e6
        assert total_s == pytest.approx(stage[f"busy_{phase}_s"])
    ends = [(event["ts"], event["ts"] + event["dur"]) for event in calls]
    assert all(end <= start for (_, end), (start, _) in zip(ends, ends[1:], strict=False))
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert len(names) == 1 and "t4-16g on node0" in names[0]


def test_the_report_says_how_busy_the_stages_were(job):
    report = json.loads(job.report.read_text())
    (stage,) = report["stages"]
    busy_s = stage["busy_prefill_s"] + stage["busy_decode_s"]
    assert stage["busy_share"] == pytest.approx(busy_s / report["total_s"])
    assert report["num_failed"] == 0
    assert stage["most_prefill_rows"] is None and stage["most_decode_rows"] is None


def test_the_results_are_those_of_transformers(job, tiny_tales):
    expected = {f"r{number}": tokens for number, tokens in tiny_tales.expected.items()}
    assert job.results() == expected


def test_a_second_run_keeps_the_first_ones_results(job):
    before = job.output.read_text()
    command = job.command([], job.plan([8], batch=4, p=2, q=2), "--dtype", "float32")
    again = CliRunner().invoke(main, [*command, "--no-refill", "--prefill-chunk", "16"])
    assert again.exit_code == 0, again.output
    assert "earlier results are kept as out.jsonl.old" in again.stderr
    assert job.output.with_name("out.jsonl.old").read_text() == before
    lines = (sorted(text.splitlines()) for text in (before, job.output.read_text()))
    assert next(lines) == next(lines)


def test_tokens_that_cannot_be_decoded_are_kept_and_their_request_has_failed():
    class Written:
        lines: list = []

        def write(self, finished, text):
            self.lines.append((finished.token_ids, finished.reason, finished.error, text))

    def decode(tokens, skip_special_tokens):
        raise TypeError("no such token")

    collector = Collector(Written(), SimpleNamespace(decode=decode))
    collector.finish(Finished(Request("a", 0, (1,), 2), (7, 8), "length"))
    error = "the model's tokenizer cannot decode its tokens (no such token)"
    assert Written.lines == [((7, 8), "error", error, "")] and collector.num_failed == 1


def test_progress_tells_speed_busy_shares_and_the_cache():
    said: list[str] = []
    show = lambda done, detail: said.append(f"{done} {detail}")  # noqa: E731
    collector = Collector(None, None, show, is_due=lambda: True)
    status = Status(3, 120, busy_ms=(0, 0), cache_tokens=25, cache_reserved=100)
    collector.after_job(status)
    assert said[0].startswith("3 (")
    assert "stages busy 0 0 %; KV cache 25 % used" in said[0]


def test_the_prefill_ends_when_the_last_request_has_its_first_token(monkeypatch):
    """Also where decoding is under way between one prefill and the next."""
    clock = iter([1.0, 2.0, 5.0, 9.0])
    monkeypatch.setattr("llmpq.runtime.collector.time.perf_counter", lambda: next(clock))
    collector = Collector(None, None)
    for num_begun in (2, 2, 3, 3):
        collector.after_job(Status(0, 9, (0,), 1, 1, num_begun))
    assert collector.begun_s == 5.0
