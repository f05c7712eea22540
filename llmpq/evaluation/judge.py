"""Decides on transformers' own modules whether llmpq can serve a model: its spec, or why not.

`python -m llmpq.evaluation.judge CONFIG.json` prints the `ModelSpec` as JSON, or ends with exit
code 2 and one line on standard error. `llmpq.model_lookup` runs it for models that are not in its
table, and keeps the result. A model is first counted (`llmpq.models.count_model`), then a small
copy is run (`verify`), unless its family's pipelines are tested.

Not covered: weights, which may still be missing or of another shape.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

import transformers

from llmpq.errors import UserError
from llmpq.evaluation.verify import verify
from llmpq.families import family_for, has_sizes
from llmpq.model_lookup import read_config
from llmpq.model_spec import ModelSpec
from llmpq.models.count_model import count_model
from llmpq.models.stage_model import load_config


def judge(path: Path) -> ModelSpec:
    """The spec of the model with this `config.json`; `UserError` where it cannot be served."""
    config = load_config(path)
    kind, declared = config.model_type, read_config(path)["model_type"]
    if kind != declared:
        raise UserError(
            f"models of type '{declared}' are not supported: their text model is of another type "
            f"('{kind}'), as in multimodal models"
        )
    is_tested = family_for(kind).is_tested
    try:
        spec = count_model(path)
        if not is_tested or has_sizes(kind):  # a tested family may have odd settings
            verify(config)
    except UserError:
        raise
    except Exception as error:  # modules of any make raise anything
        reason = " ".join(str(error).split())[:120]
        what = f"this '{kind}' model is" if is_tested else f"models of type '{kind}' are"
        raise UserError(
            f"{what} not supported: with llmpq's cache and attention their "
            f"layers fail ({type(error).__name__}: {reason})"
        ) from None
    return spec


def main() -> int:
    """Prints the spec of one model as JSON, or says why there is none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, help="a config.json")
    options = parser.parse_args()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    try:
        spec = judge(options.config)
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return UserError.exit_code
    print(spec.model_dump_json(exclude_defaults=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
