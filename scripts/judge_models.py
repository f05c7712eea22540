#!/usr/bin/env python
"""Writes llmpq/assets/judged_models.json: the specs of configs/models that have to be judged.

Run it after a change of what is counted of layers; a test compares the file with a new count.
"""

import json
import sys
from pathlib import Path

from llmpq.evaluation.judge import judge
from llmpq.judged_models import FILE, settings_key
from llmpq.model_lookup import needs_judging, read_config

MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"


def main() -> None:
    """Judges one model after the other."""
    found = {}
    for path in sorted(MODELS.glob("*.json")):
        config = read_config(path)
        if needs_judging(config, path):
            print(path.name, file=sys.stderr)
            spec = judge(path).model_copy(update={"name": path.stem})
            found[settings_key(config)] = json.loads(spec.model_dump_json(exclude_defaults=True))
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
