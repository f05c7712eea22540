"""Which of transformers' causal language models llmpq serves: docs/models.md, made anew.

Every class that transformers has for causal language models gets a small configuration, which is
judged as `llmpq-plan` and `llmpq-run` judge it (`llmpq.evaluation.judge`). Whatever is not refused
is then tried (`llmpq.evaluation.verify`): one stage, two stages and stages of one layer, batched
and single prompts, in fp32. A class is "exact", or refused with a reason; anything else is a fault
of llmpq, and the exit code is 1.

    python scripts/models.py [MODEL_TYPE ...] [--output docs/models.md]

It takes some minutes on one core. Not covered: models whose code is not part of transformers.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from llmpq.errors import UserError
from llmpq.evaluation.judge import judge
from llmpq.evaluation.verify import verify
from llmpq.families import has_sizes
from llmpq.language_part import LANGUAGE_PARTS
from llmpq.model_lookup import load_model_spec, read_config, refuse_plainly
from llmpq.models.stage_model import load_config

ROOT = Path(__file__).resolve().parents[1]
# Under the names that most families have; each takes the ones that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    # Their defaults leave out how many experts a token uses.
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8, "moe_intermediate_size": 32},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1},
}
# The sizes of latent attention, for classes that have it: as many key-value heads as query heads.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
EXACT = "exact"


@dataclass(frozen=True)
class Result:
    """What became of one class."""

    model_type: str
    class_name: str
    verdict: str  # EXACT, "refused" or "fault"
    reason: str = ""


def settings_of(model_type: str) -> dict[str, Any]:
    """A small configuration: of the sizes above, those that the class has."""
    if model_type in LANGUAGE_PARTS:
        text = next(iter(LANGUAGE_PARTS[model_type]))
        return {"model_type": model_type, "text_config": settings_of(text)}
    made = CONFIG_MAPPING[model_type]
    try:
        own = made().to_dict()
    except Exception:  # there are classes whose defaults do not go together
        own = SIZES
    names = getattr(made, "attribute_map", {})
    sizes = {names.get(key, key): value for key, value in SIZES.items()}
    known = {key: value for key, value in sizes.items() if key in own or key.endswith("_id")}
    size = {"head_dim": 8} if "head_dim" in own else {}
    size |= LATENT if "kv_lora_rank" in own else {}
    return {"model_type": model_type, **known, **size, **MORE.get(model_type, {})}


def tried(model_type: str, class_name: str) -> Result:
    """Judges and tries one class."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        try:
            path.write_text(json.dumps(settings_of(model_type)))
            _serve(path, model_type)
        except UserError as error:
            reason = str(error).removeprefix(f"{path}: ")
            return Result(model_type, class_name, "refused", reason)
        except Exception as error:
            return Result(model_type, class_name, "fault", f"{type(error).__name__}: {error}")
    return Result(model_type, class_name, EXACT)


def _serve(path: Path, model_type: str) -> None:
    refuse_plainly(read_config(path), str(path))
    if has_sizes(model_type):
        load_model_spec(str(path))
    else:
        judge(path)
    verify(load_config(path))


def table(results: Sequence[Result]) -> str:
    """The page, as Markdown."""
    exact = [result for result in results if result.verdict == EXACT]
    lines = [
        "# Models",
        "",
        "Made by `python scripts/models.py`; do not edit. Every class that transformers "
        f"{transformers.__version__} has for causal language models, with a small configuration",
        "and random weights, in fp32: its pipelines of one stage, two stages and stages of one "
        "layer give transformers' own logits,",
        "prompts batched and single (*exact*), or `llmpq-plan` and `llmpq-run` refuse it with the "
        "reason and exit code 2. Where a class has windows of attention,",
        "they are shorter than most prompts, and layers keep no more. Other settings of a class "
        "that is exact may still be refused: each model's own are",
        "tried before it is planned or served.",
        "",
        f"{len(exact)} of {len(results)} are exact.",
        "",
        "| model type | class | | why not |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{r.model_type}` | {r.class_name} | {r.verdict} | {_cell(r.reason)} |" for r in results
    ]
    return "\n".join(lines) + "\n"


def _cell(reason: str) -> str:
    """One line without an address in memory or a path, which change."""
    return " ".join(reason.replace("|", "\\|").split())[:200]


def all_tried(model_types: Iterable[str]) -> list[Result]:
    """One after another; says how far it is."""
    results = []
    for model_type in model_types:
        name = CLASSES[model_type]
        results.append(tried(model_type, name if isinstance(name, str) else name[0]))
        print(f"{model_type}: {results[-1].verdict} {results[-1].reason[:100]}", file=sys.stderr)
    return results


def main() -> int:
    """Tries all classes, or the ones that are named; 1 where one is a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--output", type=Path, help="writes the page to this file")
    options = parser.parse_args()
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = all_tried(options.model_types or sorted(CLASSES))
    if options.output:
        options.output.write_text(table(results), encoding="utf-8")
    return 1 if any(result.verdict == "fault" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
