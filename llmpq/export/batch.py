"""Runs the requests of prompts.jsonl through vLLM, offline, and writes out.jsonl.

    python batch.py PROMPTS.jsonl OUT.jsonl [--ignore-eos] [--new-tokens N] [--ray]

This file is copied beside an exported checkpoint; it needs vLLM and nothing of llmpq. `engine.json`
beside it holds vLLM's options. Lines are those of llmpq-run: {"id", "prompt" or "prompt_token_ids",
"max_new_tokens"} in, {"id", "text", "token_ids", ...} out. A result is written as soon as it is
there. Started again after whatever ended it, it cuts off a half-written last line, and does only
the requests that have no line yet, so that each id occurs once. A request that vLLM refuses gets a
line with the reason, and the exit code is then 5. With --ray, the stages run on the nodes of a Ray
cluster, in the order of the plan.
"""

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

DEFAULT_NEW_TOKENS = 64
FAILED = 5  # the exit code where some requests failed
Request = dict[str, object]


def read_requests(path: Path) -> list[Request]:
    """The requests of a file; raises ValueError for a line that is none, or an id that recurs."""
    requests, seen = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        request = json.loads(line)
        one = request.get("id") if isinstance(request, dict) else None
        if not isinstance(one, str | int) or isinstance(one, bool):
            raise ValueError(f"{path}:{number}: expected an object with an 'id'")
        if ("prompt" in request) == ("prompt_token_ids" in request):
            raise ValueError(f"{path}:{number}: expected either 'prompt' or 'prompt_token_ids'")
        if key(one) in seen:
            raise ValueError(f"{path}:{number}: the id {one!r} occurs twice")
        seen.add(key(one))
        requests.append(request)
    return requests


def key(one: object) -> str:
    """A text that differs for ids that differ, as 1 and "1" do."""
    return json.dumps(one)


def finished(file: BinaryIO) -> set[str]:
    """The keys of the ids that have a whole line; a last line without its end is cut off."""
    file.seek(0)
    data = file.read()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        file.truncate(end)
    return {key(json.loads(line)["id"]) for line in data[:end].splitlines() if line.strip()}


def result_line(request: Request, output: Any) -> dict[str, object]:
    """A finished request as llmpq-run writes it."""
    answer = output.outputs[0]
    return {
        "id": request["id"],
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_new_tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
    }


def error_line(request: Request, reason: str) -> dict[str, object]:
    """A request that vLLM refused."""
    counts = {"num_prompt_tokens": 0, "num_new_tokens": 0}
    failed = {"text": "", "token_ids": [], **counts, "finish_reason": "error", "error": reason}
    return {"id": request["id"], **failed}


def results(
    engine: Any, requests: list[Request], new_tokens: int, ignore_eos: bool
) -> Iterator[dict[str, object]]:
    """The line of every request, as soon as it has ended; `engine` is vLLM's `LLMEngine`."""
    from vllm import SamplingParams

    waiting: dict[str, Request] = {}
    for request in requests:
        most = request.get("max_new_tokens", new_tokens)
        settings = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=ignore_eos)
        ids = request.get("prompt_token_ids")
        prompt = request["prompt"] if ids is None else {"prompt_token_ids": ids}
        try:
            engine.add_request(key(request["id"]), prompt, settings)
        except ValueError as error:  # too long, or an empty prompt
            yield error_line(request, str(error))
            continue
        waiting[key(request["id"])] = request
    while waiting:
        for output in engine.step():
            if output.finished:
                yield result_line(waiting.pop(output.request_id), output)


def cores_of_stages(count: int) -> str:
    """This machine's cores in `count` equal parts, as VLLM_CPU_OMP_THREADS_BIND has them."""
    cores = sorted(os.sched_getaffinity(0))
    size = max(1, len(cores) // count)
    parts = [cores[number * size : (number + 1) * size] or cores for number in range(count)]
    return "|".join(",".join(map(str, part)) for part in parts)


def prepare(settings: Mapping[str, Any]) -> None:
    """Sets the variables that vLLM reads when it is imported; those of the user are kept."""
    for name, value in settings["environment"].items():
        os.environ.setdefault(name, value)
    if settings["on_cpu"]:
        stages = settings["engine"]["pipeline_parallel_size"]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores_of_stages(stages))


def run(folder: Path, arguments: argparse.Namespace) -> int:
    """Does what is left of the requests, and returns the exit code."""
    settings = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    requests, failed = read_requests(arguments.prompts), 0
    with open(arguments.output, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        done = finished(file)
        left = [request for request in requests if key(request["id"]) not in done]
        print(f"{len(requests) - len(left)} of {len(requests)} requests are done", file=sys.stderr)
        if not left:
            return 0
        prepare(settings)
        from vllm import EngineArgs, LLMEngine

        backend = {"distributed_executor_backend": "ray"} if arguments.ray else {}
        engine_args = EngineArgs(model=str(folder), **settings["engine"], **backend)
        engine = LLMEngine.from_engine_args(engine_args)
        for line in results(engine, left, arguments.new_tokens, arguments.ignore_eos):
            failed += line["finish_reason"] == "error"
            file.write(
                json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
            )
            file.flush()
    return FAILED if failed else 0


def run_in_ray(folder: Path, arguments: argparse.Namespace) -> int:
    """Does the same inside a placement group of Ray, whose bundles are the workers in order."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    settings = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    bundles = settings["ray_bundles"]
    order = {"VLLM_RAY_BUNDLE_INDICES": ",".join(map(str, range(len(bundles))))}
    ray.init(address="auto", runtime_env={"env_vars": {**settings["environment"], **order}})
    group = ray.util.placement_group(bundles)
    print(f"waiting for the nodes of {len(bundles)} workers", file=sys.stderr)
    ray.get(group.ready())
    where = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(run)
    return int(ray.get(task.remote(folder, arguments)))


def main() -> None:
    """Reads the command line and runs the requests."""
    parser = argparse.ArgumentParser(description="Run prompts.jsonl through vLLM, resumably.")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--new-tokens", type=int, default=DEFAULT_NEW_TOKENS)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--ray", action="store_true", help="Run on the nodes of a Ray cluster.")
    arguments = parser.parse_args()
    arguments.prompts, arguments.output = arguments.prompts.resolve(), arguments.output.resolve()
    folder = Path(__file__).resolve().parent
    try:
        sys.exit((run_in_ray if arguments.ray else run)(folder, arguments))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
