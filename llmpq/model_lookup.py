"""Which model is meant, and whether llmpq can serve it, from its `config.json` alone.

`load_model_spec` is the one judgement of which models can be served, for planning and running: no
weights, no torch, no network. A family whose row has sizes (`llmpq.families`), with settings that
are known to work, is served. Any other model is judged on transformers' own modules by a process
of its own (llmpq.evaluation.judge), where torch and transformers are installed, and what was found
is kept in the user's cache folder; elsewhere it is refused. `spec_from_config` judges nothing: it
takes what is not known for LLaMA-shaped, and says so (`guessed`).
"""

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmpq.artifact import cache_folder, parse_json, show_value, write_text
from llmpq.config_keys import ConfigKeys
from llmpq.errors import UserError
from llmpq.families import family_for, has_sizes
from llmpq.family_sizes import llama_sizes
from llmpq.judged_models import shipped_spec
from llmpq.language_part import LANGUAGE_PARTS, has_other_parts, language_part
from llmpq.model_known import (
    is_known,
    needs_other_layers,
    num_experts,
    odd_number,
    state_beside_keys,
    with_floats,
)
from llmpq.model_spec import ASSETS, LayerKind, LinearShape, ModelSpec
from llmpq.version import __version__

DEFAULT_MODEL = "tiny-tales"  # ships inside the package
JUDGE_LIMIT_S = 300.0
JUDGED_WITH = ("torch", "transformers")  # what it takes to judge a model of an unknown family
MOST_SAID = 290  # characters of a refusal


def load_model_spec(model: str) -> ModelSpec:
    """The spec of MODEL: a directory, a `config.json`, a cached hub id, or the shipped model.

    Raises `UserError` where llmpq cannot serve such a model, with the reason.
    """
    path = config_path(model)
    whole = _read_whole(path)
    spec = _spec(language_part(whole), model, path)
    return spec.model_copy(update={"has_other_parts": has_other_parts(whole)})


def _spec(config: Mapping[str, Any], model: str, path: Path) -> ModelSpec:
    spec = _known_spec(config, model, path)
    if spec is not None:
        return spec
    refuse_plainly(config, str(path))
    return (shipped_spec(config) or _judged(config, path)).model_copy(update={"name": model})


def _known_spec(config: Mapping[str, Any], model: str, path: Path) -> ModelSpec | None:
    """The spec of a model of a family with sizes, and settings that work; None for others."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and not has_sizes(model_type):
        return None
    spec = spec_from_config(config, name=model, source=str(path))
    heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
    return spec if is_known(config, spec.num_layers, heads) else None


def needs_judging(config: Mapping[str, Any], path: Path) -> bool:
    """Whether only transformers' modules tell what a model consists of."""
    return _known_spec(config, str(path), path) is None


def check_model(folder: Path, planned: ModelSpec, whose: str) -> None:
    """Raises `UserError` where the model in a folder is not the one of `whose` plan.

    Plans that know of no windows of attention have reserved more than their models need.
    """
    spec = load_model_spec(str(folder))
    if any(planned.windows) and spec.windows != planned.windows:
        raise UserError(
            f"{folder}: its layers attend to other windows of tokens than those of {whose}"
        )
    spec, planned = spec.without_windows(), planned.without_windows()
    if (spec.num_layers, spec.model_key) != (planned.num_layers, planned.model_key):
        raise UserError(
            f"{folder}: is another model than that of {whose}: {spec.num_layers} layers of "
            f"{spec.model_key}, planned were {planned.num_layers} of {planned.model_key}"
        )
    for name in ("linears", "experts", "kinds", "layer_kinds"):
        if getattr(spec, name) != getattr(planned, name):
            raise UserError(f"{folder}: has other layers than the model of {whose} ({name})")


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a `config.json`; of a model of text and images, those of its language model.

    Special numbers are read as transformers reads them.
    """
    return language_part(_read_whole(path))


def _read_whole(path: Path) -> dict[str, Any]:
    config = with_floats(parse_json(path))
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a model configuration, found {type(config).__name__}")
    return config


def refuse_plainly(config: Mapping[str, Any], source: str) -> None:
    """Refuses by the settings alone what needs no more to be refused."""
    model_type = config["model_type"]
    if odd := odd_number(config):
        raise UserError(f"{source}: '{odd[0]}' is {show_value(odd[1])}, which no model can have")
    if not isinstance(config.get("text_config", {}), dict):
        raise UserError(f"{source}: 'text_config' must be an object")
    for settings in (config, config.get("text_config", {})):
        layers = f"{source}: layers of this '{model_type}' model"
        if state := state_beside_keys(settings):
            raise UserError(
                f"{layers} keep a state that is not keys and values ({state}), which llmpq does "
                "not serve"
            )
        if need := needs_other_layers(settings):
            raise UserError(f"{layers} {need}, which llmpq does not serve")
    if "text_config" in config and not has_sizes(model_type):
        raise UserError(
            f"{source}: '{model_type}' is a multimodal model (it has a 'text_config'), whose text "
            f"model llmpq cannot load; it can of {', '.join(LANGUAGE_PARTS)}"
        )


def _judged(config: Mapping[str, Any], path: Path) -> ModelSpec:
    """The spec as `llmpq.evaluation.judge` finds it; raises `UserError` with what it says."""
    if not all(find_spec(name) for name in JUDGED_WITH):
        raise _refusal(
            path,
            f"whether llmpq can serve this '{config['model_type']}' model is judged with "
            "transformers, which is not installed here: pip install 'llmpq[run]'",
        )
    kept = cache_folder() / f"judged-{_fingerprint(config)}.json"
    with contextlib.suppress(OSError, ValueError):  # not there yet, or broken: judge again
        return ModelSpec.model_validate_json(kept.read_bytes())
    command = [sys.executable, "-m", "llmpq.evaluation.judge", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=JUDGE_LIMIT_S)
        spec = ModelSpec.model_validate_json(done.stdout) if done.returncode == 0 else None
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise _refusal(path, f"llmpq could not judge this model ({error})") from None
    if spec is None:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason was given"]
        raise _refusal(path, said[-1].removeprefix(f"{path}: "))
    with contextlib.suppress(UserError):  # no cache: it is judged again next time
        write_text(kept, done.stdout.decode())
    return spec


def _refusal(path: Path, reason: str) -> UserError:
    """One line of at most `MOST_SAID` characters, unless the path alone is as long."""
    room = max(120, MOST_SAID - len(f"{path}: "))
    return UserError(f"{path}: {reason if len(reason) <= room else reason[: room - 3] + '...'}")


def _fingerprint(config: Mapping[str, Any]) -> str:
    """Of the configuration and of all that judges it."""
    versions = [version(name) for name in JUDGED_WITH]
    package = Path(__file__).parent
    files = [ASSETS / "activations.json", *sorted(package.rglob("*.py"))]
    own = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    text = json.dumps([config, versions, __version__, own], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def config_path(model: str) -> Path:
    """Where the `config.json` of MODEL lies."""
    path = Path(model)
    if model == DEFAULT_MODEL and not path.exists():
        return ASSETS / DEFAULT_MODEL / "config.json"
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; a model directory needs a config.json")
        return path
    if path.is_file():
        return path
    return _hub_config(model)


def _hub_config(model: str) -> Path:
    if model.count("/") != 1 or model.startswith((".", "/")) or model.endswith(".json"):
        raise UserError(
            f"{model}: no such model; give a directory, a config.json, a Hugging Face id "
            f"(owner/name) or '{DEFAULT_MODEL}', which ships with llmpq"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(
            f"{model}: to look up a Hugging Face id, pip install 'llmpq[run]', "
            "or give the path of its config.json"
        ) from None
    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the hub client raises many kinds; each means: not to be had
        raise UserError(f"{model}: its config.json could not be fetched ({error})") from None


def spec_from_config(
    config: Mapping[str, Any], name: str, source: str = "config.json"
) -> ModelSpec:
    """The spec that a configuration describes; all missing or wrong keys in one `UserError`."""
    keys = ConfigKeys(config, source)
    model_type = keys.text("model_type")
    refuse_plainly(config, source)
    if (count := num_experts(config)) > 1:
        raise UserError(
            f"{source}: names {count} experts, whose sizes in '{model_type}' models llmpq does not "
            "know"
        )
    sizes = (family_for(model_type).sizes or llama_sizes)(keys)
    keys.raise_faults()
    counts = asdict(sizes)
    windows = counts.pop("windows") or (None,) * sizes.num_layers
    counts["linears"] = tuple(LinearShape(**matrix._asdict()) for matrix in sizes.linears)
    known = list(dict.fromkeys(windows))
    layer = {name: counts[name] for name in LayerKind.model_fields if name in counts}
    kinds = [LayerKind(name=kind_name(w), window=w, **layer) for w in known]
    several = len(known) > 1
    return ModelSpec(
        name=name,
        model_type=model_type,
        guessed=not has_sizes(model_type),
        window=known[0],
        kinds=tuple(kinds) if several else (),
        layer_kinds=tuple(map(known.index, windows)) if several else (),
        **counts,
    )


def kind_name(window: int | None, matrices: str = "dense") -> str:
    """What readers call a kind of layers with such matrices and window."""
    return matrices if window is None else f"{matrices}, window of {window}"
