"""The launch files of an export, with vLLM's own parser and with a real Ray."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from exports import EPYC, plan_of
from test_vllm import LIMIT_S

from llmpq.export.launch_scripts import RAY_PORT, engine_json, ray_script, run_script
from llmpq.vllm_settings import vllm_settings


def printed(python: str, script: str, word: str, *words: str) -> object:
    """What a script of this folder prints after a word, as JSON."""
    path = Path(__file__).with_name(script)
    command = [python, str(path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith(f"{word} "))
    return json.loads(line.removeprefix(f"{word} "))


@pytest.mark.parametrize("sharing", [1, 2])
def test_vllm_reads_the_options_as_they_are_meant(vllm_python, tmp_path, sharing):
    opt = Path(__file__).parents[2] / "configs" / "models" / "opt-1.3b.json"
    if sharing == 1:
        plan = plan_of(["16"] * 3, ["4"] * 5, device=EPYC)
    else:
        plan = plan_of(["16"] * 3, ["4"] * 21, model=opt, sharing=2)
    settings = vllm_settings(plan)
    (tmp_path / "run.sh").write_text(run_script(plan, settings))
    (tmp_path / "engine.json").write_text(engine_json(plan, settings))
    words = [str(tmp_path / name) for name in ("run.sh", "engine.json")]
    assert printed(vllm_python, "parse.py", "PARSED", *words) == settings.engine()


def test_ray_places_the_workers_in_the_order_of_the_plan(vllm_python, tmp_path):
    """Two nodes of a Ray cluster on this machine; the stages alternate between them."""
    nodes = ["b", "a", "b"]
    plan = plan_of(["16"] * 3, ["4"] * 3, ["4"] * 2, nodes=nodes)
    (tmp_path / "engine.json").write_text(engine_json(plan, vllm_settings(plan)))
    (tmp_path / "ray.sh").write_text(ray_script(plan, vllm_settings(plan)))
    real = Path(vllm_python).with_name("ray")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "ray"  # the same, in the foreground, so that it can be ended
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@" --block --disable-usage-stats\n')
    wrapper.chmod(0o755)
    path = f"{wrapper.parent}:{real.parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    started = []
    try:
        for words in (["head"], ["worker", "a", "127.0.0.1"]):
            command = ["bash", str(tmp_path / "ray.sh"), *words]
            log = (tmp_path / f"{words[0]}.log").open("wb")
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(8)  # for the head to listen
            assert started[-1].poll() is None, (tmp_path / f"{words[0]}.log").read_text()[-2000:]
        address = f"127.0.0.1:{RAY_PORT}"
        placed = printed(vllm_python, "placed.py", "PLACED", str(tmp_path / "engine.json"), address)
        assert placed == [["llmpq_node_0"], ["llmpq_node_1"], ["llmpq_node_0"]]
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=60)
