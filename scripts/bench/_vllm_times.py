"""Run by vLLM's Python: seconds of the requests of a file on an exported plan, without the start.

python _vllm_times.py FOLDER PROMPTS.jsonl TIMES.json ROUNDS: before each round a line is read from
standard input, and after it one is written to standard output, so that rounds can alternate with
those of another program.
"""

import json
import sys
import time
from pathlib import Path

sys.path[0] = sys.argv[1]  # in place of this folder, whose benchmark has the name of vLLM
import batch  # noqa: E402  of the export


def main() -> None:
    """Warms up, then runs the rounds."""
    folder, prompts, out, rounds = sys.argv[1:]
    settings = json.loads((Path(folder) / "engine.json").read_text())
    batch.prepare(settings)
    from vllm import EngineArgs, LLMEngine

    requests = batch.read_requests(Path(prompts))
    engine_args = EngineArgs(model=folder, enable_prefix_caching=False, **settings["engine"])
    engine = LLMEngine.from_engine_args(engine_args)
    list(batch.results(engine, requests[:8], 8, True))
    print("ready", file=sys.stderr)
    seconds, tokens = [], 0
    for _ in range(int(rounds)):
        sys.stdin.readline()
        start = time.monotonic()
        lines = list(batch.results(engine, requests, 32, True))
        seconds.append(time.monotonic() - start)
        tokens = sum(line["num_new_tokens"] for line in lines)
        print("done", flush=True)
    Path(out).write_text(json.dumps({"seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
