"""A job of `llmpq-run` in real processes: its files, its command lines, its workers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from families import TINY_TALES, TinyModel, hand_made_plan

from llmpq.artifact import write_json
from llmpq.model_lookup import load_model_spec

NEW = 20
PATIENCE_S = 240.0  # for what comes much sooner; a busy machine takes its time
RUN = [sys.executable, "-m", "llmpq.run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SLOW = {"rehearse": {"t4-16g": {"slowdown": 10, "memory_mib": 1000}}}


class Job:
    """Prompts, plans and results in one folder."""

    def __init__(self, folder: Path, model: TinyModel) -> None:
        self.folder, self.model = folder, model
        self.prompts, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.report = folder / "report.json"
        lines = [
            {"id": f"r{r.id}", "prompt_token_ids": list(r.prompt), "max_new_tokens": r.new_tokens}
            for r in model.requests
        ]
        self.prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def plan(self, ends, **more) -> Path:
        """A plan's file. More new tokens are reserved than are asked for."""
        spec = load_model_spec(str(TINY_TALES))
        path = self.folder / f"plan{len(ends)}.json"
        write_json(path, hand_made_plan(spec, ends, new=NEW, **more))
        return path

    def command(self, start: list[str], plan: Path, *more: str) -> list[str]:
        """In 32 bits, so that tokens do not depend on which requests share a micro-batch."""
        files = ["--plan", plan, "--prompts", self.prompts, "--output", self.output]
        files += ["--report", self.report, "--dtype", "float32"]
        return [*start, *map(str, files), *more]

    def expected(self) -> dict[str, list[int]]:
        """What `results` must be: transformers' own tokens."""
        return {f"r{number}": tokens for number, tokens in self.model.expected.items()}

    def results(self) -> dict[str, list[int]]:
        """Tokens by id; every id exactly once."""
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        ids = [line["id"] for line in lines]
        assert len(set(ids)) == len(ids)
        return {line["id"]: line["token_ids"] for line in lines}


def run(command: list[str], timeout: float = PATIENCE_S) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def rank_of(process: psutil.Process) -> int:
    return int(process.environ()["RANK"])


def wait_until(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "the run has written nothing"
        time.sleep(0.02)
