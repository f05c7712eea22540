"""The shape of a decoder model, from its `config.json` alone: no weights, no torch, no network.

`ModelSpec` holds what planning needs: the linear operators of a layer (they are what is
quantised), the other parameters, the embedding, the head and the cache's width. Families are
described in one small table each; tests compare the counts with transformers' own modules.
`load_model_spec` is the one judgement of which models can be served, for planning and running.
A family in the table with settings that are known to work is served. Any other model is judged on
transformers' own modules by a process of its own (llmpq.evaluation.judge), where torch and
transformers are installed, and what was found is kept in the user's cache folder; elsewhere it is
refused. `spec_from_config` judges nothing: it takes what is not known for LLaMA-shaped, and says so
(`guessed`).
`ModelSpec.shard` is what one of several devices holds when they share every layer (tensor
parallelism, cut as in Megatron-LM, arXiv 1909.08053).
Not covered: mixtures of experts, encoders, models of text and images, models with several kinds
of layer.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from llmpq import __version__
from llmpq.artifact import Strict, cache_folder, parse_json, show_value, write_text
from llmpq.errors import UserError
from llmpq.model_known import is_known, num_experts, odd_number, with_floats

ASSETS = Path(__file__).parent / "assets"
DEFAULT_MODEL = "tiny-tales"  # ships inside the package
JUDGE_LIMIT_S = 300.0
JUDGED_WITH = ("torch", "transformers")  # what it takes to judge a model of an unknown family
MOST_SAID = 290  # characters of a refusal
MOST_SIZE = 2**31 - 1  # of anything that a configuration counts
MOST_LAYERS, LAYER_KEYS = 10_000, ("num_hidden_layers", "n_layer")
# Families whose pipelines are tested to give the tokens of the whole model.
TESTED = frozenset(
    {"opt", "bloom", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gemma2", "gemma3_text"}
    | {"granite"}
)

ALL_HEADS = "as many key-value heads"  # the table of activations: heads that are not grouped

# How devices that share a layer cut its matrices: by output features, by input features (their
# results are then summed), or by output features a key-value head at a time ("kv"): where there
# are fewer of these heads than devices, several devices hold the same one.
Cut = Literal["out", "in", "kv"]
CUTS: dict[str, Cut] = {
    "q_proj": "out",
    "k_proj": "kv",
    "v_proj": "kv",
    "query_key_value": "out",
    "gate_proj": "out",
    "up_proj": "out",
    "fc1": "out",
    "dense_h_to_4h": "out",
    "o_proj": "in",
    "out_proj": "in",
    "dense": "in",
    "down_proj": "in",
    "fc2": "in",
    "dense_4h_to_h": "in",
}


class Linear(Strict):
    """A weight matrix `[out_features, in_features]` of a layer."""

    name: str
    out_features: int = Field(gt=0)
    in_features: int = Field(gt=0)


class Moment(Strict):
    """What a stage has alive at one time, beside weights and cache.

    `num_bytes`: products of sizes ("requests*tokens*hidden"), each with its factor in bytes.
    `op`: the linear that computes at that time, whose own needs come on top; empty where none.
    `later`: met only after the stage's first layer.
    """

    op: str = ""
    biased: bool = False
    later: bool = False
    num_bytes: dict[str, float]


class Activations(Strict):
    """The moments of each phase that may decide its peak.

    `_first`: those that only a stage that embeds tokens has besides; `_last`: that has the head.
    """

    prefill: tuple[Moment, ...]
    decode: tuple[Moment, ...]
    prefill_first: tuple[Moment, ...]
    decode_first: tuple[Moment, ...]
    prefill_last: tuple[Moment, ...]
    decode_last: tuple[Moment, ...]


class ModelSpec(Strict):
    """Sizes of one decoder-only model. Counts are numbers of parameters, not bytes."""

    name: str
    model_type: str
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    linears: tuple[Linear, ...]
    layer_other_params: int = Field(ge=0)  # norms and biases of one layer
    embedding_params: int = Field(ge=0)  # token and position embeddings and their norm
    head_params: int = Field(ge=0)  # the output matrix, also where it is tied to the embedding
    final_params: int = Field(ge=0)  # the norm after the last layer
    tied: bool
    eager_attention: bool = False  # attention scores are held in memory, [batch, heads, s, s]
    activations: Activations | None = None  # counted on this model; None: as its family
    guessed: bool = False

    @property
    def model_key(self) -> str:
        """Names the layer shape; profiles of equal keys are interchangeable."""
        return (
            f"{self.model_type}-h{self.hidden_size}-f{self.ffn_size}-a{self.num_heads}"
            f"-kv{self.num_kv_heads}-d{self.head_dim}-v{self.vocab_size}"
        )

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values that one token leaves in the cache of one layer."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def layer_params(self) -> int:
        """Parameters of one decoder layer."""
        weights = sum(op.out_features * op.in_features for op in self.linears)
        return weights + self.layer_other_params

    def shard(self, degree: int) -> "ModelSpec":
        """What one of `degree` devices holds and computes when they share every layer.

        Embedding and head are cut by the vocabulary; norms, biases and positions are on each
        device. Raises `UserError` where the model cannot be cut so.
        """
        if degree == 1:
            return self
        if faults := shard_faults(self, degree):
            raise UserError(f"{self.name}: {'; '.join(faults)}")
        # Every family's token embedding has as many parameters as its head.
        token_params = min(self.head_params, self.embedding_params)
        other_params = self.embedding_params - token_params
        return self.model_copy(
            update={
                "ffn_size": self.ffn_size // degree,
                "num_heads": self.num_heads // degree,
                "num_kv_heads": max(1, self.num_kv_heads // degree),
                "vocab_size": _part(self.vocab_size, degree),
                "linears": tuple(_cut(self, op, degree) for op in self.linears),
                "embedding_params": other_params + _part(token_params, degree),
                "head_params": _part(self.head_params, degree),
            }
        )


def shard_faults(spec: ModelSpec, degree: int) -> list[str]:
    """Why `degree` devices cannot share a layer of this model; empty where they can."""
    if spec.model_type not in TESTED:
        return [f"how devices share the layers of '{spec.model_type}' models is not known"]
    faults = []
    for what, size in (("attention heads", spec.num_heads), ("feed-forward width", spec.ffn_size)):
        if size % degree:
            faults.append(f"{what} {size} cannot be cut into {degree} equal parts")
    heads = spec.num_kv_heads
    if heads % degree and degree % heads:
        faults.append(
            f"{heads} key-value heads can be neither cut nor repeated for {degree} devices"
        )
    for op in spec.linears:
        if op.name not in CUTS:
            faults.append(f"how to cut the matrix '{op.name}' is not known")
        elif _cut_size(op) % _num_parts(spec, op, degree):
            faults.append(f"{op.name} ({_cut_size(op)}) cannot be cut into {degree} equal parts")
    return faults


def tensor_parallel_degrees(spec: ModelSpec, most: int) -> tuple[int, ...]:
    """1, and the powers of two up to `most` devices that can share a layer of this model."""
    powers = (2**exponent for exponent in range(1, most.bit_length()))
    return (1, *(degree for degree in powers if not shard_faults(spec, degree)))


def _part(size: int, degree: int) -> int:
    """The largest of `degree` nearly equal parts."""
    return -(-size // degree)


def _cut_size(op: Linear) -> int:
    return op.in_features if CUTS[op.name] == "in" else op.out_features


def _num_parts(spec: ModelSpec, op: Linear, degree: int) -> int:
    """Into how many different parts a matrix falls."""
    return min(degree, spec.num_kv_heads) if CUTS[op.name] == "kv" else degree


def _cut(spec: ModelSpec, op: Linear, degree: int) -> Linear:
    side = "in_features" if CUTS[op.name] == "in" else "out_features"
    return op.model_copy(update={side: _cut_size(op) // _num_parts(spec, op, degree)})


def load_model_spec(model: str) -> ModelSpec:
    """The spec of MODEL: a directory, a `config.json`, a cached hub id, or the shipped model.

    Raises `UserError` where llmpq cannot serve such a model, with the reason.
    """
    path = config_path(model)
    config = read_config(path)
    if not isinstance(config.get("model_type"), str) or config["model_type"] in FAMILIES:
        spec = spec_from_config(config, name=model, source=str(path))
        heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
        if is_known(config, spec.num_layers, heads):
            return spec
    refuse_plainly(config, str(path))
    return _judged(config, path).model_copy(update={"name": model})


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a `config.json`, its special numbers as transformers reads them."""
    config = with_floats(parse_json(path))
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a model configuration, found {type(config).__name__}")
    return config


def refuse_plainly(config: dict[str, Any], source: str) -> None:
    """Refuses by the settings alone what needs no more to be refused."""
    model_type = config["model_type"]
    if odd := odd_number(config):
        raise UserError(f"{source}: '{odd[0]}' is {show_value(odd[1])}, which no model can have")
    if not isinstance(config.get("text_config", {}), dict):
        raise UserError(f"{source}: 'text_config' must be an object")
    if "text_config" in config and model_type not in FAMILIES:
        raise UserError(
            f"{source}: '{model_type}' is a model of text and something else (it has a "
            "'text_config'), which llmpq cannot load; use a text-only model of the family"
        )
    if num_experts(config) > 1:
        raise UserError(f"{source}: mixture-of-experts models ({model_type}) are not supported")


def _judged(config: dict[str, Any], path: Path) -> ModelSpec:
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


def _fingerprint(config: dict[str, Any]) -> str:
    """Of the configuration and of all that judges it."""
    versions = [version(name) for name in JUDGED_WITH]
    package = Path(__file__).parent
    files = [ASSETS / "activations.json", *sorted(package.glob("*/*.py"))]
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


def spec_from_config(config: dict[str, Any], name: str, source: str = "config.json") -> ModelSpec:
    """The spec that a configuration describes; all missing or wrong keys in one `UserError`."""
    keys = _Config(config, source)
    model_type = keys.text("model_type")
    refuse_plainly(config, source)
    family = FAMILIES.get(model_type)
    spec = (family or _llama)(keys)
    keys.raise_faults()
    return ModelSpec(name=name, model_type=model_type, guessed=family is None, **spec)


class _Config:
    """Reads integers from a configuration and collects what is wrong with them."""

    def __init__(self, data: dict[str, Any], source: str) -> None:
        self.data = data
        self.source = source
        self.faults: list[str] = []

    def text(self, key: str) -> str:
        value = self.data.get(key)
        if not isinstance(value, str):
            raise UserError(f"{self.source}: '{key}' is missing or not a text")
        return value

    def count(self, *names: str, default: int | None = None) -> int:
        """The first of `names` that is present, a positive integer."""
        for name in names:
            value = self.data.get(name)
            if value is None:
                continue
            most = MOST_LAYERS if name in LAYER_KEYS else MOST_SIZE
            if isinstance(value, int) and value > most:
                large = f"'{name}' is {show_value(value)}, more than {most}"
                self.faults.append(f"{self.source}: {large}, the most that llmpq takes")
                return 1
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                self.faults.append(
                    f"{self.source}: '{name}' must be a positive integer: {show_value(value)}"
                )
                return 1
            return value
        if default is None:
            self.faults.append(f"{self.source}: '{names[0]}' is missing")
        return default or 1

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if value is not None and not isinstance(value, bool):
            self.faults.append(f"{self.source}: '{key}' must be true or false: {show_value(value)}")
        return bool(value)

    def raise_faults(self) -> None:
        if self.faults:
            raise UserError("\n".join(dict.fromkeys(self.faults)))


def _linear(name: str, out_features: int, in_features: int) -> Linear:
    return Linear(name=name, out_features=out_features, in_features=in_features)


def _common(keys: _Config, ffn_factor: int | None = None) -> dict[str, Any]:
    hidden = keys.count("hidden_size", "n_embed")
    heads = keys.count("num_attention_heads", "n_head")
    ffn_default = ffn_factor * hidden if ffn_factor else None
    return {
        "num_layers": keys.count("num_hidden_layers", "n_layer"),
        "hidden_size": hidden,
        "ffn_size": keys.count("intermediate_size", "ffn_dim", default=ffn_default),
        "num_heads": heads,
        "num_kv_heads": keys.count("num_key_value_heads", default=heads),
        "head_dim": keys.count("head_dim", default=max(1, hidden // heads)),
        "vocab_size": keys.count("vocab_size"),
        "max_positions": keys.count("max_position_embeddings", "seq_length", default=2048),
        "head_params": keys.count("vocab_size") * hidden,
    }


def _llama(
    keys: _Config,
    *,
    qkv_bias: bool | None = None,
    norms: int = 2,
    qk_norm: bool = False,
    tied: bool = False,
) -> dict[str, Any]:
    """Gated feed-forward, rotary positions, root-mean-square norms, grouped-query attention."""
    spec = _common(keys)
    hidden, ffn, dim = spec["hidden_size"], spec["ffn_size"], spec["head_dim"]
    query, key_value = spec["num_heads"] * dim, spec["num_kv_heads"] * dim
    attention_bias = keys.flag("attention_bias", False)
    biased_qkv = attention_bias if qkv_bias is None else qkv_bias
    other = norms * hidden + (2 * dim if qk_norm else 0)
    other += (query + 2 * key_value) if biased_qkv else 0
    other += hidden if attention_bias else 0
    other += (2 * ffn + hidden) if keys.flag("mlp_bias", False) else 0
    linears = (
        _linear("q_proj", query, hidden),
        _linear("k_proj", key_value, hidden),
        _linear("v_proj", key_value, hidden),
        _linear("o_proj", hidden, query),
        _linear("gate_proj", ffn, hidden),
        _linear("up_proj", ffn, hidden),
        _linear("down_proj", hidden, ffn),
    )
    return spec | {
        "linears": linears,
        "layer_other_params": other,
        "embedding_params": spec["vocab_size"] * hidden,
        "final_params": hidden,
        "tied": keys.flag("tie_word_embeddings", tied),
    }


def _qwen2(keys: _Config) -> dict[str, Any]:
    return _llama(keys, qkv_bias=True)


def _qwen3(keys: _Config) -> dict[str, Any]:
    return _llama(keys, qk_norm=True)


def _gemma2(keys: _Config) -> dict[str, Any]:
    return _llama(keys, norms=4, tied=True) | {"eager_attention": True}


def _gemma3(keys: _Config) -> dict[str, Any]:
    return _llama(keys, norms=4, qk_norm=True, tied=True)


def _opt(keys: _Config) -> dict[str, Any]:
    spec = _common(keys)
    hidden, ffn = spec["hidden_size"], spec["ffn_size"]
    embed = keys.count("word_embed_proj_dim", default=hidden)
    bias = 4 * hidden + ffn + hidden if keys.flag("enable_bias", True) else 0
    positions = (spec["max_positions"] + 2) * hidden
    project = embed * hidden if embed != hidden else 0
    final_norm = 2 * hidden if keys.flag("do_layer_norm_before", True) else 0
    attention = tuple(_linear(f"{n}_proj", hidden, hidden) for n in ("q", "k", "v", "out"))
    return spec | {
        "linears": (*attention, _linear("fc1", ffn, hidden), _linear("fc2", hidden, ffn)),
        "layer_other_params": 4 * hidden + bias,
        "embedding_params": spec["vocab_size"] * embed + positions + project,
        "head_params": spec["vocab_size"] * embed,
        "final_params": final_norm + project,
        "tied": keys.flag("tie_word_embeddings", True),
    }


def _fused_qkv(keys: _Config, **more: Any) -> dict[str, Any]:
    """BLOOM and GPT-NeoX: one matrix for query, key and value; biases everywhere."""
    spec = _common(keys, ffn_factor=4)
    hidden, ffn = spec["hidden_size"], spec["ffn_size"]
    attention_bias = 4 * hidden if keys.flag("attention_bias", True) else 0
    linears = (
        _linear("query_key_value", 3 * hidden, hidden),
        _linear("dense", hidden, hidden),
        _linear("dense_h_to_4h", ffn, hidden),
        _linear("dense_4h_to_h", hidden, ffn),
    )
    return (
        spec
        | {
            "linears": linears,
            "layer_other_params": 4 * hidden + attention_bias + ffn + hidden,
            "embedding_params": spec["vocab_size"] * hidden,
            "final_params": 2 * hidden,
            "tied": False,
        }
        | more
    )


def _bloom(keys: _Config) -> dict[str, Any]:
    hidden, vocab = keys.count("hidden_size", "n_embed"), keys.count("vocab_size")
    more = {"embedding_params": vocab * hidden + 2 * hidden, "eager_attention": True}
    return _fused_qkv(keys, tied=keys.flag("tie_word_embeddings", True), **more)


def _gpt_neox(keys: _Config) -> dict[str, Any]:
    return _fused_qkv(keys, tied=keys.flag("tie_word_embeddings", False))


FAMILIES: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "opt": _opt,
    "bloom": _bloom,
    "gpt_neox": _gpt_neox,
}
