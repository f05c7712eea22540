"""Runs the requests of prompts.jsonl through vLLM, offline, and writes out.jsonl.

    python batch.py PROMPTS.jsonl OUT.jsonl [--ignore-eos] [--new-tokens N] [--ray]

This file is copied beside an exported checkpoint; it needs vLLM and nothing of llmpq. `engine.json`
beside it holds vLLM's options. Lines are those of llmpq-run: {"id", "prompt" or "prompt_token_ids",
"max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop"} in, {"id", "text", "token_ids",
...} out. A result is written as soon as it is there. Started again after whatever ended it, it cuts
off a half-written last line, and does only the requests that have no result yet, so that each id
occurs once. A request that cannot be done gets a line with the reason, and the exit code is then 5;
the next start tries it again. With --ray, the stages run on the nodes of a Ray cluster, in the
order of the plan.
"""

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FAILED = 5  # the exit code where some requests failed
LENGTHS = ("max_new_tokens", "max_tokens", "max_completion_tokens")
SETTINGS = ("temperature", "top_p", "top_k", "seed", "stop")
KNOWN = {"id", "prompt", "prompt_token_ids", *LENGTHS, *SETTINGS}
Request = dict[str, object]


def read_requests(path: Path) -> list[Request]:
    """The requests of a file; raises ValueError for a line that is none, or an id that recurs."""
    requests, seen = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            request = _request(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if key(request["id"]) in seen:
            raise ValueError(f"{path}:{number}: the id {request['id']!r} occurs twice")
        seen.add(key(request["id"]))
        requests.append(request)
    return requests


def _request(line: object) -> Request:
    """A line's values, those that are null left out; raises ValueError where it is no request."""
    if not isinstance(line, dict):
        raise ValueError("expected an object with an 'id'")
    request = {name: value for name, value in line.items() if value is not None}
    if not isinstance(request.get("id"), str | int) or isinstance(request["id"], bool):
        raise ValueError("expected an object with an 'id'")
    if ("prompt" in request) == ("prompt_token_ids" in request):
        raise ValueError("expected either 'prompt' or 'prompt_token_ids'")
    if not isinstance(request.get("prompt", ""), str):
        raise ValueError("'prompt' must be a text")
    ids = request.get("prompt_token_ids", [])
    if not isinstance(ids, list) or not all(_is_count(one, 0) for one in ids):
        raise ValueError("'prompt_token_ids' must be a list of token ids")
    if unknown := sorted(request.keys() - KNOWN):
        raise ValueError(f"'{unknown[0]}' is not known to this script; it reads {sorted(KNOWN)}")
    lengths = [request[name] for name in LENGTHS if name in request]
    if len(lengths) > 1 or not all(_is_count(one, 1) for one in lengths):
        raise ValueError(f"expected one of {', '.join(LENGTHS)}, a whole number of 1 or more")
    return request


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def asked_tokens(request: Request, default: int) -> int:
    """How many new tokens a request asks for."""
    found = next((request[name] for name in LENGTHS if name in request), default)
    assert isinstance(found, int)
    return found


def key(one: object) -> str:
    """A text that differs for ids that differ, as 1 and "1" do."""
    return json.dumps(one)


def read_results(path: Path) -> dict[str, dict[str, object]]:
    """The lines of a file of results, by the keys of their ids; without a half-written last line.

    Raises ValueError for a file that this script did not write.
    """
    if not path.exists():
        return {}
    found = {}
    *lines, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            known = isinstance(result, dict) and {"id", "finish_reason"} <= result.keys()
        except ValueError:
            known = False
        if not known:
            raise ValueError(f"{path}:{number}: is no result of this script; name a new file")
        found[key(result["id"])] = result
    if rest and not lines and not rest.startswith(b'{"id"'):
        raise ValueError(f"{path}: holds no results of this script; name a new file")
    return found


def keep(path: Path, results: Mapping[str, object]) -> None:
    """Writes these lines alone, in place of what a file holds."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(b"".join(map(line_of, results.values())))
    part.replace(path)


def line_of(result: object) -> bytes:
    """A result as a line."""
    return json.dumps(result, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


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
        own = {"temperature": 0.0} | {n: request[n] for n in SETTINGS if n in request}
        most = asked_tokens(request, new_tokens)
        ids = request.get("prompt_token_ids")
        prompt = request["prompt"] if ids is None else {"prompt_token_ids": ids}
        try:
            settings = SamplingParams(max_tokens=most, ignore_eos=ignore_eos, **own)
            engine.add_request(key(request["id"]), prompt, settings)
        except (ValueError, TypeError) as error:  # too long, an empty prompt, an odd setting
            yield error_line(request, str(error))
            continue
        waiting[key(request["id"])] = request
    while waiting:
        for output in engine.step():
            if output.finished:
                request = waiting.pop(output.request_id)
                yield _checked(request, result_line(request, output), new_tokens)


def _checked(request: Request, line: dict[str, object], new_tokens: int) -> dict[str, object]:
    """The line, or an error where vLLM cut the answer because a request must not be longer."""
    most, given = asked_tokens(request, new_tokens), line["num_new_tokens"]
    if line["finish_reason"] != "length" or given == most:
        return line
    return error_line(
        request,
        f"prompt and {most} new tokens are longer than the requests that were planned for "
        f"({line['num_prompt_tokens']} and {given} fit); plan for longer ones, or ask for fewer",
    )


def cores_of_workers(count: int) -> str:
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
        sizes = ("pipeline_parallel_size", "tensor_parallel_size")
        workers = settings["engine"][sizes[0]] * settings["engine"][sizes[1]]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores_of_workers(workers))


def run(folder: Path, arguments: argparse.Namespace) -> int:
    """Does what is left of the requests, and returns the exit code."""
    settings = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    prompts, results_file = arguments.prompts, arguments.output
    requests, failed = read_requests(prompts), 0
    if results_file.exists() and results_file.samefile(prompts):
        raise ValueError(f"{results_file}: holds the prompts; name another file for the results")
    with open(results_file.with_name(f"{results_file.name}.lock"), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{results_file}: another start of this script writes it") from None
        done = {
            name: result
            for name, result in read_results(results_file).items()
            if result["finish_reason"] != "error"
        }
        left = [request for request in requests if key(request["id"]) not in done]
        print(f"{len(requests) - len(left)} of {len(requests)} requests are done", file=sys.stderr)
        if not left:
            return 0
        keep(results_file, done)
        prepare(settings)
        from vllm import EngineArgs, LLMEngine

        backend = {"distributed_executor_backend": "ray"} if arguments.ray else {}
        engine_args = EngineArgs(model=str(folder), **settings["engine"], **backend)
        engine = LLMEngine.from_engine_args(engine_args)
        new_tokens = arguments.new_tokens or settings["new_tokens"]
        with open(results_file, "ab") as file:
            for line in results(engine, left, new_tokens, arguments.ignore_eos):
                failed += line["finish_reason"] == "error"
                file.write(line_of(line))
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
    parser.add_argument(
        "--new-tokens",
        type=int,
        help="New tokens of requests that do not say how many; default: as planned.",
    )
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--ray", action="store_true", help="Run on the nodes of a Ray cluster.")
    arguments = parser.parse_args()
    if arguments.new_tokens is not None and arguments.new_tokens < 1:
        parser.error("--new-tokens: must be 1 or more")
    arguments.prompts, arguments.output = arguments.prompts.resolve(), arguments.output.resolve()
    folder = Path(__file__).resolve().parent
    try:
        sys.exit((run_in_ray if arguments.ray else run)(folder, arguments))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
