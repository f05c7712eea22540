"""Requests with sampling settings and stops of their own."""

import json

import pytest
from jobs import RUN, run
from test_failed_requests import Job

START = {"prompt": "Once upon a time", "max_new_tokens": 12}


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_requests_with_settings_of_their_own(job):
    """One alone fails that cannot be done; a stop ends an answer, and is not part of it."""
    job.write(START | {"id": "all"})
    assert job.run().exit_code == 0
    whole = job.lines()["all"]
    stop = whole["text"].split()[3]
    lines = [
        START | {"id": "all"},
        START | {"id": "stopped", "stop": ["never", stop]},
        START | {"id": "drawn", "temperature": 3.0, "seed": 1},
        START | {"id": "again", "temperature": 3.0, "seed": 1},
        START | {"id": "other", "temperature": 3.0, "seed": 2},
        START | {"id": "refused", "response_format": {"type": "json_object"}},
    ]
    job.write(*lines)
    result = job.run()
    assert result.exit_code == 5 and "with sampling settings of their own: 3" in result.stderr
    found = job.lines()
    assert found["all"]["token_ids"] == whole["token_ids"]
    assert found["stopped"]["text"] == whole["text"][: whole["text"].index(stop)]
    assert found["stopped"]["finish_reason"] == "stop"
    count = found["stopped"]["num_new_tokens"]
    assert found["stopped"]["token_ids"] == whole["token_ids"][:count] and 0 < count < 12
    assert found["drawn"]["token_ids"] == found["again"]["token_ids"] != whole["token_ids"]
    assert found["drawn"]["token_ids"] != found["other"]["token_ids"]
    assert "'response_format'" in found["refused"]["error"]
    lines[2]["temperature"] = 2.0
    job.write(*lines)
    other = job.run("--resume")
    assert other.exit_code == 2 and "settings of their own than now: drawn" in other.stderr


def test_processes_of_two_stages_draw_what_one_does(job, tmp_path):
    ways = [{}, {"temperature": 2.0}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}, {"stop": "."}]
    lines = [START | {"id": i} | ways[i % 4] for i in range(8)]
    job.write(*lines)
    assert job.run().exit_code == 0
    (tmp_path / "more").mkdir()
    two = Job(tmp_path / "more", ends=(3, 8))
    two.write(*lines)
    done = run([*RUN, *two.words()])
    assert done.returncode == 0, done.stderr
    alone, together = job.lines(), two.lines()
    assert alone == together and len(alone) == 8
    assert alone[0]["token_ids"] == alone[4]["token_ids"] != alone[1]["token_ids"]
    assert alone[2]["token_ids"] == alone[6]["token_ids"]  # by a seed of their own
    assert json.dumps(alone[3]["text"]).count(".") == 0
