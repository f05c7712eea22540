"""Sound inputs of every kind that the commands read, made with the shipped model, and their kinds.

`make_inputs` writes them into one folder: some by hand, the others by the commands themselves (a
run's output, journal, report and packed weights, a profile, sensitivity and second moments).
`KINDS` says for each file which command reads it, in which words, and which other files that
command needs. Parquet is left out where pyarrow is not installed.
"""

import csv
import gzip
import io
import json
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from _engine_fuzz import sound_plan

from llmpq.artifact import write_json
from llmpq.model_spec import ASSETS
from llmpq.plan_data import Plan

CLUSTER = {
    "name": "lab",
    "nodes": [
        {
            "name": "node0",
            "devices": [
                {"type": "t4-16g", "count": 2},
                {"type": "v100-32g", "count": 1, "memory_gib": 30.0},
            ],
            "link": {"bandwidth_gbs": 12.0, "latency_us": 20},
        }
    ],
    "link": {"bandwidth_gbs": 1.25, "latency_us": 50},
}
WORKLOAD = {"name": "few", "prompt_tokens": {"min": 4, "max": 9}, "new_tokens": 4}
WORKLOAD |= {"num_requests": 8, "batch": 4}
TRACED = WORKLOAD | {"prompt_tokens": {"trace": "trace.csv", "column": "ContextTokens"}}
PACKED_TRACE = TRACED | {"prompt_tokens": {"trace": "trace.csv.gz", "column": "ContextTokens"}}
TRACE = "Time,ContextTokens,GeneratedTokens\n" + "".join(f"{i},{i + 4},{i + 1}\n" for i in range(9))
TEXT = "Once upon a time there was a little girl who liked to play in the garden. " * 60

PLAN = "--cluster cluster.yaml --workload workload.yaml --model model --no-compare --no-what-if"
RUN = "--plan plan.json --model model --device cpu --dtype float32 --output new.jsonl --prompts"
EVAL = "--model model --device cpu --window 16 --max-windows 1 --precisions 16"
LAYERS = "layers --device cpu --threads 1 --precisions 16,8 --prompt-tokens 16 "
LAYERS += "--past-tokens 16 --prefill-micro-batches 1 --decode-micro-batches 1 --type t4-16g"
SENSITIVITY = "sensitivity --precisions 16,8 --moment-tokens 64 --window 16 --max-windows 2"
MODEL = "model/config.json", "model/generation_config.json", "model/model.safetensors"
MODEL += "model/tokenizer.json", "model/tokenizer_config.json"
ASKED = "cluster.yaml", "workload.yaml", "model/config.json"


@dataclass(frozen=True)
class Kind:
    """A file that is damaged, its form, the command that reads it, and what else that needs."""

    name: str
    file: str
    form: str
    command: str
    needs: tuple[str, ...] = ()
    weight: int = 1


def run(file: str, form: str, more: str = "", *needs: str, weight: int = 1) -> Kind:
    """A file that llmpq-run reads."""
    prompts = file if file.startswith("prompts") else "in.jsonl"
    words = f"run {RUN} {prompts} {more}"
    return Kind(f"run {file}", file, form, words, ("plan.json", "in.jsonl", *MODEL, *needs), weight)


def plan(file: str, form: str, more: str = "", *needs: str, weight: int = 1) -> Kind:
    """A file that llmpq-plan reads."""
    return Kind(f"plan {file}", file, form, f"plan {PLAN} {more}", (*ASKED, *needs), weight)


TRACED_WORDS = PLAN.replace("workload.yaml", "traced.yaml")
PACKED_WORDS = PLAN.replace("workload.yaml", "packed-trace.yaml")
RESUME = "--resume --output out.jsonl"
RECALIBRATE = "profile recalibrate --report report.json --profiles profiles -o corrected"
RECALIBRATED = "plan.json", "report.json", "profiles/t4.json"
GPTQ = "eval --model gptq --device cpu --window 16 --max-windows 1 --precisions 4"
SHARDS = "eval --model shards --device cpu --window 16 --max-windows 1 --precisions 16"

KINDS = [
    plan("cluster.yaml", "yaml", weight=3),
    plan("workload.yaml", "yaml", weight=2),
    plan("model/config.json", "json", weight=2),
    plan("profiles/t4.json", "json", "--profiles profiles", weight=3),
    plan("sensitivity.json", "json", "--sensitivity sensitivity.json", weight=3),
    Kind("plan trace.csv", "trace.csv", "csv", f"plan {TRACED_WORDS}", (*ASKED, "traced.yaml"), 2),
    Kind(
        "plan trace.csv.gz",
        "trace.csv.gz",
        "csv.gz",
        f"plan {PACKED_WORDS}",
        (*ASKED, "packed-trace.yaml"),
    ),
    Kind("plan --evaluate", "plan.json", "json", "plan --evaluate plan.json", (), 2),
    run("plan.json", "json", weight=3),
    run("prompts.jsonl", "jsonl", weight=2),
    run("prompts-batch.jsonl", "jsonl", weight=3),
    run("prompts.csv", "csv"),
    run("prompts.json", "json"),
    run("prompts.jsonl.gz", "jsonl.gz"),
    *([run("prompts.parquet", "binary")] if find_spec("pyarrow") else []),
    run("model/config.json", "json", weight=3),
    run("model/generation_config.json", "json", weight=2),
    run("model/tokenizer.json", "json", weight=2),
    run("model/tokenizer_config.json", "json", weight=2),
    run("model/model.safetensors", "safetensors", weight=3),
    run("out.jsonl", "jsonl", RESUME, "out.jsonl.journal", weight=2),
    run("out.jsonl.journal", "jsonl", RESUME, "out.jsonl", weight=2),
    run("packed/0.safetensors", "safetensors", "--cache-dir packed", "packed", weight=2),
    run("text.txt", "text", "--check-quality --check-windows 1 --check-text text.txt"),
    Kind("run --moments", "moments.safetensors", "safetensors",
         f"run {RUN} in.jsonl --moments moments.safetensors".replace("plan.json", "gptq-plan.json"),
         ("gptq-plan.json", "in.jsonl", *MODEL), 2),
    Kind("eval text.txt", "text.txt", "text", f"eval {EVAL} --text text.txt", MODEL),
    Kind("eval plan.json", "plan.json", "json", f"eval plan.json {EVAL}", MODEL),
    Kind("eval config.json", "model/config.json", "json", f"eval {EVAL}", MODEL, 2),
    Kind("eval model.safetensors", "model/model.safetensors", "safetensors", f"eval {EVAL}", MODEL),
    Kind("eval moments", "moments.safetensors", "safetensors",
         f"eval {EVAL},4 --quantizer gptq --moments moments.safetensors", MODEL),
    Kind("eval gptq config.json", "gptq/config.json", "json", GPTQ, ("gptq",), 2),
    Kind("eval quantize_config.json", "gptq/quantize_config.json", "json", GPTQ, ("gptq",), 2),
    Kind("eval gptq weights", "gptq/model.safetensors", "safetensors", GPTQ, ("gptq",), 2),
    Kind("eval index.json", "shards/model.safetensors.index.json", "json", SHARDS, ("shards",), 2),
    Kind("eval shard", "shards/a.safetensors", "safetensors", SHARDS, ("shards",)),
    Kind("profile layers config.json", "model/config.json", "json",
         f"profile {LAYERS} --budget-s 1 --model model -o p.json", MODEL),
    Kind("profile layers --extend", "profiles/t4.json", "json",
         f"profile {LAYERS} --budget-s 1 --model model --extend -o profiles/t4.json", MODEL),
    Kind("profile sensitivity moments", "moments.safetensors", "safetensors",
         f"profile {SENSITIVITY} --model model --quantizer gptq --moments moments.safetensors "
         "-o s.json", MODEL),
    Kind("profile sensitivity text", "text.txt", "text",
         f"profile {SENSITIVITY} --model model --text text.txt -o s.json", MODEL),
    Kind("recalibrate report.json", "report.json", "json", RECALIBRATE, RECALIBRATED, 3),
    Kind("recalibrate profile", "profiles/t4.json", "json", RECALIBRATE, RECALIBRATED, 2),
    Kind("links cluster", "cluster.yaml", "yaml",
         "profile links --ranks 2 --cluster cluster.yaml --budget-s 1 --device cpu"),
]  # fmt: skip


def command_of(words: str) -> tuple[Any, list[str]]:
    """The click command that the first word names, and the other words."""
    from llmpq.cli import eval, plan, profile, run

    name, *more = words.split()
    return {"plan": plan, "run": run, "eval": eval, "profile": profile}[name].main, more


def call(words: str) -> int:
    """Runs a command in this process, as its console script does; its exit code."""
    command, more = command_of(words)
    try:
        command.main(args=more, prog_name=f"llmpq {words.split()[0]}")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def make_inputs(folder: Path) -> None:
    """Fills the folder, the working directory from then on, with sound files of all kinds."""
    os.chdir(folder)
    write_by_hand()
    for words in (
        f"run {RUN} in.jsonl --output out.jsonl --report report.json --cache-dir packed -q",
        f"profile {LAYERS} --budget-s 20 --model model -q -o profiles/t4.json",
        f"profile {SENSITIVITY} --model model --quantizer gptq -q --moments moments.safetensors "
        "-o sensitivity.json",
    ):
        if call(words):
            sys.exit(f"fails with sound files: {words}")
    for name in ("profiles/t4.json", "report.json", "sensitivity.json"):
        value = json.loads(Path(name).read_text())
        numbers = name != "sensitivity.json"  # which measures the model, not the machine
        Path(name).write_text(json.dumps(_timeless(value, numbers), indent=1))
    first = min(Path("packed").glob("*.safetensors"))
    Path("packed/0.safetensors").symlink_to(first.name)  # names are recipes: one that is known


def _timeless(value: Any, numbers: bool) -> Any:
    """What was measured with other numbers, so that the same seed gives the same cases anywhere."""
    if isinstance(value, dict):
        set_anew = {"created": "", "host": "", "seconds": 1.5, "num_samples": 9, "notes": ["one"]}
        return {key: set_anew.get(key, _timeless(each, numbers)) for key, each in value.items()}
    if isinstance(value, list):
        return [_timeless(each, numbers) for each in value]
    return 0.5 if numbers and isinstance(value, float) else value


def write_by_hand() -> None:
    """Fills the working directory with the files that need no command: in a moment."""
    shutil.copytree(ASSETS / "tiny-tales", "model")
    _write_questions()
    _write_prompts()
    _write_gptq()
    _write_shards()


def _write_questions() -> None:
    for name, value in (
        ("cluster.yaml", CLUSTER),
        ("workload.yaml", WORKLOAD),
        ("traced.yaml", TRACED),
        ("packed-trace.yaml", PACKED_TRACE),
    ):
        Path(name).write_text(yaml.safe_dump(value, sort_keys=False))
    Path("trace.csv").write_text(TRACE)
    Path("trace.csv.gz").write_bytes(gzip.compress(TRACE.encode()))
    Path("text.txt").write_text(TEXT)
    made = sound_plan().model_dump(mode="json")
    whole = made["stages"][0] | {"end_layer": 8, "precisions": ["8", "16"] * 4}
    made |= {"stages": [whole], "cluster": CLUSTER}
    write_json(Path("plan.json"), Plan.model_validate(made))
    made["quantizer"] = {"method": "gptq", "moments": "moments.safetensors"}
    write_json(Path("gptq-plan.json"), Plan.model_validate(made))


def _write_prompts() -> None:
    lines: list[dict[str, Any]] = [{"id": i, "prompt": f"Once upon {i}"} for i in range(2)]
    lines += [{"id": f"t{i}", "prompt_token_ids": [i + 3, 5], "max_new_tokens": 2} for i in (0, 1)]
    lines[1] |= {"temperature": 0.7, "top_k": 5, "stop": ["."]}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Path("in.jsonl").write_text(text)
    Path("prompts.jsonl").write_text(text)
    Path("prompts.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    Path("prompts.json").write_text(json.dumps(lines, indent=1))
    batch = [
        {
            "custom_id": f"b{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "any", "prompt": f"Once {i}", "max_tokens": 2, "n": 1} | own,
        }
        for i, own in enumerate(
            (
                {"temperature": 0.5, "top_p": 0.9, "seed": 1},
                {"stop": "a", "presence_penalty": 0, "logprobs": 0},
                {"top_k": 3, "response_format": {"type": "text"}, "user": "u"},
            )
        )
    ]
    Path("prompts-batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in batch))
    rows = [{"id": f"c{i}", "prompt": f"One day, {i}", "max_new_tokens": "2"} for i in range(3)]
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    Path("prompts.csv").write_text(table.getvalue())
    if find_spec("pyarrow"):
        from pyarrow import Table, parquet

        whole = [row | {"max_new_tokens": 2} for row in rows]
        parquet.write_table(Table.from_pylist(whole), "prompts.parquet")


def _write_gptq() -> None:
    """The model with 4-bit codes, as AutoGPTQ stores them; the codes themselves are made up."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree("model", "gptq")
    stored = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in load_file("model/model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        out_size, in_size = tensor.shape
        linear = name.removesuffix(".weight")
        size, groups = (in_size // 8, out_size), in_size // 64
        stored[f"{linear}.qweight"] = torch.randint(0, 2**31 - 1, size, generator=generator).int()
        stored[f"{linear}.qzeros"] = torch.full((groups, out_size // 8), 0x77777777).int()
        stored[f"{linear}.scales"] = torch.full((groups, out_size), 0.01, dtype=torch.float16)
        stored[f"{linear}.g_idx"] = torch.arange(in_size, dtype=torch.int32) // 64
    save_file(stored, "gptq/model.safetensors", {"format": "pt"})
    settings = {"bits": 4, "group_size": 64, "desc_act": False, "sym": True}
    Path("gptq/quantize_config.json").write_text(json.dumps(settings))


def _write_shards() -> None:
    """The model in two files and their index."""
    from safetensors.torch import load_file, save_file

    shutil.copytree("model", "shards")
    tensors = load_file("shards/model.safetensors")
    Path("shards/model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: "a" if i < len(names) // 2 else "b" for i, name in enumerate(names)}
    for file in "ab":
        own = {name: tensors[name] for name in names if files[name] == file}
        save_file(own, f"shards/{file}.safetensors", {"format": "pt"})
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {n: f"{files[n]}.safetensors" for n in names},
    }
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index, indent=1))
