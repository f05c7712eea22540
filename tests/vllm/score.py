"""Run by vLLM's Python: scores token ids by an exported model, teacher-forced.

    python score.py FOLDER IDS.json OUT.json [NAME=VALUE ...]

IDS.json holds lists of token ids. For each position but the first of a list, OUT.json has the
token that the model expects most (`best`) and the log-probability of the one that is there. The
further words are arguments of `vllm.LLM`, over those of engine.json.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import batch  # noqa: E402  of the export


def main() -> None:
    folder, ids, out, *changes = sys.argv[1:]
    settings = json.loads((Path(folder) / "engine.json").read_text())
    settings["engine"] |= {name: json.loads(v) for name, v in (c.split("=") for c in changes)}
    batch.prepare(settings)
    from vllm import LLM, SamplingParams

    prompts = [{"prompt_token_ids": one} for one in json.loads(Path(ids).read_text())]
    llm = LLM(folder, **settings["engine"])
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    scored = []
    for output in found:
        best, logprobs = [], []
        given = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        for token, ranked in given:
            best.append(next(t for t, one in ranked.items() if one.rank == 1))
            logprobs.append(ranked[token].logprob)
        scored.append({"best": best, "logprobs": logprobs})
    Path(out).write_text(json.dumps(scored))


if __name__ == "__main__":
    main()
