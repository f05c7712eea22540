"""Fits what kernels reach of a spec sheet, to tables of times measured on real GPUs.

    python scripts/fit_efficiency.py --data FOLDER [--write]

Every table becomes one list of observations: a decoder layer (its matrices, its attention, its
norms and the like) on one GPU, and the seconds it took. Few coefficients, shared by all GPUs, turn
spec-sheet figures into seconds; they are fitted to relative errors, each (GPU, source, phase)
weighing the same. A model is judged by leaving one GPU out: fit on the others, predict it.
`--write` stores the coefficients and their error in `llmpq/assets/efficiency.yaml`, which
`llmpq.costs.device_speed` reads. The formula is that module's own, so the two cannot drift.

The sources differ in what they time, which nuisance coefficients take up: the seconds a kernel
takes to start and drain, a whole layer's overhead in the Helix tables, and how long the requests
were in them. None of these describes a GPU. Not covered: CPUs, and fewer bits than 16, whose
kernels differ from engine to engine: those of llmpq are in `llmpq.kernel_table`.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from llmpq.costs.device_speed import EFFICIENCY_PATH, kernel_s, reached_peak
from llmpq.devices import DeviceType, device_library

Array = np.ndarray
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gpu"
PHASES = ("prefill", "decode")
DECODE_ROWS = (1, 8, 16, 32, 64, 128, 256)
PREFILL_ROWS = (128, 256, 512, 1024, 2048, 4096, 8192)
MAX_ROUNDING = 0.05  # rows whose rounding may be a larger share of the time are left out
LEAST_SHARE = 0.92  # of the time that peak and bandwidth allow: faster is impossible
# The library's name of each table's GPU, and the GPU that is left out with it.
NAMES = {
    ("helix", "a100"): "a100-40g",
    ("helix", "v100"): "v100-16g",
    ("helix", "l4"): "l4-24g",
    ("helix", "t4"): "t4-16g",
    ("vidur", "a100"): "a100-80g",
    ("vidur", "a40"): "a40-48g",
    ("vidur", "h100"): "h100-80g",
    ("aiconfigurator", "a100_sxm"): "a100-80g",
    ("aiconfigurator", "h100_sxm"): "h100-80g",
    ("aiconfigurator", "l40s"): "l40s-48g",
    ("llmservingsim", "RTX3090"): "rtx3090-24g",
    ("llmservingsim", "RTX4090"): "rtx4090-24g",
    ("llmservingsim", "A6000"): "a6000-48g",
}
SYSTEMS = ("a100_sxm", "h100_sxm", "l40s")
SOURCES = (
    "Helix (layer times of LLaMA-30B and -70B on A100-40, V100, L4, T4)",
    "Vidur, Microsoft (operators of several models on A100, A40, H100)",
    "AIConfigurator, NVIDIA (matrix products and attention on A100, H100, L40S)",
    "LLMServingSim (operators of Llama-3.1-8B on RTX 3090, RTX 4090, RTX A6000)",
)


@dataclass(frozen=True)
class Shape:
    """A decoder layer: hidden size, feed-forward width, heads; `gated` has three matrices."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    gated: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of query-key-value, output, up (with gate) and down."""
        key_value = self.kv_heads * self.head_dim
        up = 2 * self.ffn if self.gated else self.ffn
        return (
            (self.hidden + 2 * key_value, self.hidden),
            (self.hidden, self.hidden),
            (up, self.hidden),
            (self.hidden, self.ffn),
        )

    @property
    def elementwise_bytes(self) -> float:
        """Of one token: two norms and two sums, rotary positions, the activation; read, written."""
        key_value = self.kv_heads * self.head_dim
        return 2.0 * (8 * self.hidden + 2 * (self.hidden + key_value) + 3 * self.ffn)

    def cut(self, degree: int) -> "Shape":
        """Heads and width of one of `degree` GPUs, as a layer of its own."""
        return replace(
            self,
            name=f"{self.name}/{degree}",
            ffn=self.ffn // degree,
            heads=self.heads // degree,
            kv_heads=max(1, self.kv_heads // degree),
        )


LLAMA_8B = Shape("Llama-3.1-8B", 4096, 14336, 32, 8)
LLAMA_30B = Shape("Llama-30B", 6656, 17920, 52, 52)
LLAMA_70B = Shape("Llama-2-70B", 8192, 28672, 64, 8)
OPT_30B = Shape("OPT-30B", 7168, 28672, 56, 56, gated=False)
SHAPES = (
    LLAMA_8B,
    LLAMA_70B,
    Shape("Llama-2-7B", 4096, 11008, 32, 32),
    Shape("Llama-2-13B", 5120, 13824, 40, 40),
    Shape("Qwen2.5-14B", 5120, 13824, 40, 8),
    Shape("Qwen2.5-32B", 5120, 27648, 40, 8),
)


@dataclass(frozen=True)
class Observation:
    """A layer, or the measured part of it, on one GPU. Bytes and operations are of that part."""

    gpu: str
    source: str
    phase: str
    shape: str
    time_s: float
    matrices: tuple[tuple[float, float, float], ...]  # rows, outputs, inputs
    num_kernels: float
    attention_operations: float = 0.0
    attention_bytes: float = 0.0  # of decoding, apart from what `past` brings
    past_bytes: float = 0.0  # per past token, where the past is not known
    elementwise_bytes: float = 0.0
    eager: bool = False  # elementwise operators run one by one

    @property
    def left_out_with(self) -> str:
        """Cards of one chip are left out together."""
        return self.gpu.split("-")[0]


# ---- the tables


def observations(data: Path) -> list[Observation]:
    """All of them at 16 bits, without those that no card could have reached."""
    found = [*helix(data), *vidur(data), *aiconfigurator(data), *llmservingsim(data)]
    return [one for one in found if one.time_s > LEAST_SHARE * least_s(one)]


def least_s(one: Observation) -> float:
    """What peak and bandwidth of the spec sheet allow; unknown requests count as none."""
    device = device_library()[one.gpu]
    peak, bandwidth = device.fp16_tflops * 1e12, device.bandwidth_gbs * 1e9
    matrices = sum(
        max(2 * m * n * k / peak, 2 * (n * k + m * k + m * n) / bandwidth)
        for m, n, k in one.matrices
    )
    attention = max(one.attention_operations / peak, one.attention_bytes / bandwidth)
    return matrices + attention


def rows_of(shape: Shape, rows: float) -> tuple[tuple[float, float, float], ...]:
    """The matrices of a layer as multiplied with `rows` tokens."""
    return tuple((float(rows), float(n), float(k)) for n, k in shape.matrices)


def causal_operations(shape: Shape, batch: float, tokens: float) -> float:
    """Scores and their sum over values, the lower triangle only."""
    return 2.0 * shape.heads * shape.head_dim * batch * tokens**2


def cache_bytes(shape: Shape, batch: float, past: float) -> float:
    """Keys and values of 16 bits."""
    return 4.0 * shape.kv_heads * shape.head_dim * batch * past


def helix(data: Path) -> Iterable[Observation]:
    """Whole layers in an engine. Prompts count as the mean prompt of its trace, 763 tokens."""
    table = pd.read_csv(data / "helix" / "layer_latency.csv")
    shapes = {"llama1_30b": LLAMA_30B, "llama2_70b": LLAMA_70B}
    for row in table.itertuples():
        key, ms = ("helix", row.machine), row.latency_ms_per_layer
        step = 0.05 if ms % 1 else 0.5
        if key not in NAMES or ms * MAX_ROUNDING < step:
            continue
        shape, tokens = shapes[row.model], float(row.tokens)
        phase = "prefill" if row.phase == "prompt" else "decode"
        prompt = min(tokens, 763.0)
        yield Observation(
            NAMES[key],
            "helix",
            phase,
            shape.name,
            ms / 1e3,
            rows_of(shape, tokens),
            num_kernels=12,
            attention_operations=causal_operations(shape, tokens / prompt, prompt)
            if phase == "prefill"
            else 0.0,
            past_bytes=cache_bytes(shape, tokens, 1) if phase == "decode" else 0.0,
            elementwise_bytes=shape.elementwise_bytes * tokens,
        )


def vidur(data: Path) -> Iterable[Observation]:
    """Matrices, norms and activations by kernel time; with attention where it was measured."""
    table = pd.read_csv(data / "vidur" / "mlp_median.csv.gz")
    table = table[(table.num_tensor_parallel_workers == 1) & (table.model != "microsoft/phi-2")]
    columns = [c for c in table if c.endswith("_ms") and c != "emb_ms"]
    keys = ["gpu", "model", "n_embd", "n_expanded_embd", "n_head", "n_kv_head", "num_tokens"]
    table = table.groupby(keys)[columns].median().sum(axis=1).reset_index(name="ms")
    for row in table.itertuples():
        shape = Shape(row.model, row.n_embd, row.n_expanded_embd, row.n_head, row.n_kv_head)
        for phase, counts in (("prefill", PREFILL_ROWS), ("decode", DECODE_ROWS)):
            if row.num_tokens in counts:
                yield _vidur_observation(row.gpu, phase, shape, row.num_tokens, row.ms / 1e3)
    yield from _vidur_attention(data)
    yield from _vidur_elementwise(data)


def _vidur_elementwise(data: Path) -> Iterable[Observation]:
    """Norms, sums, rotary positions and activations alone: they pin what a matrix would hide."""
    table = pd.read_csv(data / "vidur" / "mlp_median.csv.gz")
    wanted = (table.num_tensor_parallel_workers == 1) & (table.model == "meta-llama/Llama-2-70b-hf")
    names = ("input_layernorm", "post_attention_layernorm", "attn_rope", "mlp_act", "add")
    columns = [f"{name}_ms" for name in names]
    table = table[wanted].groupby(["gpu", "num_tokens"])[columns].median().sum(axis=1)
    for (gpu, tokens), ms in table.items():
        if tokens in PREFILL_ROWS:
            yield Observation(
                NAMES["vidur", gpu],
                "vidur",
                "elementwise",
                "Llama-2-70B",
                ms / 1e3,
                (),
                num_kernels=5,
                elementwise_bytes=LLAMA_70B.elementwise_bytes * tokens,
            )


def _vidur_observation(
    gpu: str, phase: str, shape: Shape, rows: float, time_s: float
) -> Observation:
    return Observation(
        NAMES["vidur", gpu],
        "vidur",
        phase,
        shape.name,
        time_s,
        rows_of(shape, rows),
        num_kernels=9,
        elementwise_bytes=shape.elementwise_bytes * rows,
    )


def _vidur_attention(data: Path) -> Iterable[Observation]:
    """Half a layer of Llama-2-70B on the A100: the one shape whose attention was measured."""
    table = pd.read_csv(data / "vidur" / "mlp_median.csv.gz")
    half = table[
        (table.gpu == "a100")
        & (table.model == "meta-llama/Llama-2-70b-hf")
        & (table.num_tensor_parallel_workers == 2)
    ]
    columns = [c for c in half if c.endswith("_ms") and c != "emb_ms"]
    layer_ms = half.groupby("num_tokens")[columns].median().sum(axis=1)
    shape = LLAMA_70B
    attention = pd.read_csv(data / "vidur" / "a100_attention_median.csv.gz")
    columns = ["batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill"]
    attention = attention.groupby(columns).median(numeric_only=True).reset_index()
    for row in attention.itertuples():
        rows = row.prefill_chunk_size if row.is_prefill else row.batch_size
        past = row.kv_cache_size
        wanted = past == 0 if row.is_prefill else past in (512, 1024, 2048, 4064)
        counts = PREFILL_ROWS if row.is_prefill else DECODE_ROWS
        if rows not in counts or rows not in layer_ms.index or not wanted:
            continue
        ms = row.attn_prefill_ms if row.is_prefill else row.attn_decode_ms
        half_shape = replace(shape.cut(2), hidden=shape.hidden)
        matrices = ((5120.0, 8192.0), (8192.0, 4096.0), (28672.0, 8192.0), (8192.0, 14336.0))
        yield Observation(
            "a100-80g",
            "vidur",
            "prefill" if row.is_prefill else "decode",
            half_shape.name,
            (ms + layer_ms[rows]) / 1e3,
            tuple((float(rows), n, k) for n, k in matrices),
            num_kernels=10,
            attention_operations=2.0 * 32 * 128 * rows**2 if row.is_prefill else 0.0,
            attention_bytes=0.0 if row.is_prefill else 4.0 * 4 * 128 * rows * past,
            elementwise_bytes=2.0 * rows * (8 * 8192 + 2 * 4608 + 3 * 14336),
        )


def gemm_table(data: Path, system: str, dtype: str) -> Mapping[int, pd.DataFrame]:
    """Log seconds by (outputs, inputs) for each number of rows; the median of the harnesses."""
    table = pd.read_csv(data / "aiconfigurator" / f"gemm__{system}.csv.gz")
    table = table[(table.gemm_dtype == dtype) & (table.quality != "cache_resident")]
    table = table.groupby(["m", "n", "k"]).latency.median().reset_index()
    table["latency"] = np.log(table.latency / 1e3)
    return {
        m: group.pivot(index="n", columns="k", values="latency") for m, group in table.groupby("m")
    }


def gemm_s(tables: Mapping[int, pd.DataFrame], m: int, n: int, k: int) -> float:
    """Seconds of one product, between the grid's neighbours in logarithms; NaN outside."""
    table = tables[m]
    columns = np.log(table.columns.to_numpy(float))
    rows = np.log(table.index.to_numpy(float))
    by_n = np.array([np.interp(np.log(k), columns, line) for line in table.to_numpy()])
    inside = n <= table.index.max() and k <= table.columns.max()
    return float(np.exp(np.interp(np.log(n), rows, by_n))) if inside else float("nan")


def aiconfigurator(data: Path) -> Iterable[Observation]:
    """Matrices and attention at bf16, each timed in a loop; nothing else of the layer."""
    for system in SYSTEMS:
        gemms = gemm_table(data, system, "bfloat16")
        for phase, rows in (("decode", DECODE_ROWS), ("prefill", PREFILL_ROWS)):
            attention = attention_table(data, system, phase)
            for shape in (*SHAPES, OPT_30B):
                for m in rows:
                    matrices_s = sum(gemm_s(gemms, m, n, k) for n, k in shape.matrices)
                    yield from _with_attention(system, phase, shape, m, matrices_s, attention)


def attention_table(data: Path, system: str, phase: str) -> Mapping[tuple, float]:
    """Seconds by (batch, tokens, heads, key-value heads), heads of 128 values."""
    name = "context" if phase == "prefill" else "generation"
    table = pd.read_csv(data / "aiconfigurator" / f"{name}_attention__{system}.csv.gz")
    table = table[
        (table.head_dim == 128)
        & (table.attn_dtype == "bfloat16")
        & (table.kv_cache_dtype == "bfloat16")
        & ~(table.window_size > 0)
    ]
    tokens = table.isl + table.step
    keys = [table.batch_size, tokens, table.num_heads, table.num_key_value_heads]
    return (table.latency / 1e3).groupby(keys).median().to_dict()


def _with_attention(
    system: str,
    phase: str,
    shape: Shape,
    m: int,
    matrices_s: float,
    attention: Mapping[tuple, float],
) -> Iterable[Observation]:
    if not np.isfinite(matrices_s):
        return
    alone = Observation(
        NAMES["aiconfigurator", system],
        "aiconfigurator",
        phase,
        shape.name,
        matrices_s,
        rows_of(shape, m),
        num_kernels=4,
    )
    if shape == OPT_30B:  # no table holds its 56 heads
        yield alone
    prefills = [(m // tokens, tokens) for tokens in (512, 2048, 8192) if tokens <= m]
    decodes = [(m, past) for past in (512, 2048, 8192)]
    for batch, tokens in prefills if phase == "prefill" else decodes:
        key = (batch, tokens, shape.heads, shape.kv_heads)
        if key in attention:
            cached = cache_bytes(shape, batch, tokens) if phase == "decode" else 0.0
            of_past = 4.0 * shape.heads * shape.head_dim * batch * tokens
            causal = causal_operations(shape, batch, tokens) if phase == "prefill" else of_past
            yield replace(
                alone,
                time_s=matrices_s + attention[key],
                num_kernels=5,
                attention_operations=causal,
                attention_bytes=cached,
            )


def llmservingsim(data: Path) -> Iterable[Observation]:
    """All operators of Llama-3.1-8B; on the RTX 4090 fused ones and no attention."""
    table = pd.read_csv(data / "llmservingsim" / "layers.csv.gz")
    table = table[(table.tp == 1) & (table.model == "meta-llama/Llama-3.1-8B")]
    table = table.pivot_table(index=["gpu", "tokens"], columns="layer", values="time_us")
    shape = LLAMA_8B
    for (gpu, tokens), row in table.iterrows():
        eager = gpu != "RTX4090"
        linears = [name for name in row.index if name.endswith("_proj") and row[name] > 0]
        norms = ["input_layernorm", "post_layernorm"] if eager else ["layernorm", "layernorm"]
        others = [*norms, "act_fn", "rope" if eager else "rotary_emb"]
        for phase, counts in (("prefill", PREFILL_ROWS), ("decode", DECODE_ROWS)):
            if tokens not in counts:
                continue
            with_attention = eager and phase == "prefill"
            names = [*linears, *others, *(["attn"] if with_attention else [])]
            split = ((4096, 4096), (1024, 4096), (1024, 4096), (14336, 4096), (14336, 4096))
            cut = (*split, (4096, 4096), (4096, 14336))
            matrices = tuple((float(tokens), float(n), float(k)) for n, k in cut)
            yield Observation(
                NAMES["llmservingsim", gpu],
                "llmservingsim",
                phase,
                shape.name,
                float(row[names].sum()) / 1e6,
                matrices if eager else rows_of(shape, tokens),
                num_kernels=len(names),
                attention_operations=causal_operations(shape, 1, tokens) * with_attention,
                elementwise_bytes=shape.elementwise_bytes * tokens,
                eager=eager,
            )
        if tokens in PREFILL_ROWS:
            yield Observation(
                NAMES["llmservingsim", gpu],
                "llmservingsim",
                "elementwise",
                shape.name,
                float(row[others].sum()) / 1e6,
                (),
                num_kernels=len(others),
                elementwise_bytes=shape.elementwise_bytes * tokens,
                eager=eager,
            )


# ---- the model


START = {
    "linear_peak": 0.9,
    "linear_bandwidth": 0.85,
    "attention_peak": 0.5,
    "attention_bandwidth": 0.7,
    "elementwise_bandwidth": 0.8,
    "eager_bandwidth": 0.1,
    "sharpness": 3.0,
    "board_watts": 60.0,
    "half_rate_peak": 1.2,
    "kernel_us": 3.0,
    "helix_layer_us": 100.0,
    "helix_past_tokens": 800.0,
}
NO_POWER, NO_HALF_RATE = {"board_watts": 1e-9}, {"half_rate_peak": 1.0}
HARD = {"sharpness": 1000.0}
SHARES = (
    "linear_bandwidth",
    "attention_bandwidth",
    "elementwise_bandwidth",
    "eager_bandwidth",
)
Coefficients = Mapping[str, float]


@dataclass(frozen=True)
class Candidate:
    """A model: which coefficients are fitted; the rest stay as `fixed` says."""

    name: str
    fixed: Mapping[str, float]
    baseline: bool = False  # nothing that describes a GPU is fitted

    def free(self) -> list[str]:
        """The names of the fitted ones."""
        nuisance = ("kernel_us", "helix_layer_us", "helix_past_tokens", "eager_bandwidth")
        names = nuisance if self.baseline else START
        return [name for name in names if name not in self.fixed]


@dataclass(frozen=True)
class Table:
    """Observations as columns; matrices flattened, with the observation each belongs to."""

    rows: Sequence[Observation]
    devices: tuple[DeviceType, ...]
    device_of: Array
    columns: Mapping[str, Array]
    owner: Array
    operations: Array
    num_bytes: Array

    def predict(self, c: Coefficients) -> Array:
        """Seconds of every observation."""
        peak = np.array([d.fp16_tflops * 1e12 * reached_peak(d, c) for d in self.devices])
        attention_peak = np.array(
            [d.fp16_tflops * 1e12 * reached_peak(d, c, "attention_peak") for d in self.devices]
        )
        bandwidth = np.array([d.bandwidth_gbs * 1e9 for d in self.devices])[self.device_of]
        peak, attention_peak = peak[self.device_of], attention_peak[self.device_of]
        one, sharpness = self.columns, c["sharpness"]
        linear_bandwidth = bandwidth[self.owner] * c["linear_bandwidth"]
        each = kernel_s(
            self.operations, self.num_bytes, peak[self.owner], linear_bandwidth, sharpness
        )
        seconds = np.bincount(self.owner, each, len(self.rows))
        cached = one["attention_bytes"] + one["past_bytes"] * c["helix_past_tokens"]
        reached = bandwidth * c["attention_bandwidth"]
        seconds += kernel_s(one["attention_operations"], cached, attention_peak, reached, sharpness)
        share = np.where(one["eager"], c["eager_bandwidth"], c["elementwise_bandwidth"])
        seconds += one["elementwise_bytes"] / (bandwidth * share)
        overhead_us = c["kernel_us"] * one["num_kernels"] + c["helix_layer_us"] * one["helix"]
        return seconds + overhead_us / 1e6


def tabulate(rows: Sequence[Observation]) -> Table:
    """Columns of the observations."""
    names = sorted({one.gpu for one in rows})
    fields = ("attention_operations", "attention_bytes", "past_bytes", "elementwise_bytes")
    columns = {f: np.array([float(getattr(o, f)) for o in rows]) for f in (*fields, "num_kernels")}
    columns["eager"] = np.array([o.eager for o in rows])
    columns["helix"] = np.array([float(o.source == "helix") for o in rows])
    owner = np.repeat(np.arange(len(rows)), [len(o.matrices) for o in rows])
    m, n, k = np.array([matrix for o in rows for matrix in o.matrices]).T
    return Table(
        rows,
        tuple(device_library()[name] for name in names),
        np.array([names.index(o.gpu) for o in rows]),
        columns,
        owner,
        2 * m * n * k,
        2 * (n * k + m * k + m * n),
    )


def weights(rows: Sequence[Observation]) -> Array:
    """Square roots of weights that give each (GPU, source, phase) the same say."""
    groups = [(o.gpu, o.source, o.phase) for o in rows]
    counts = {group: groups.count(group) for group in set(groups)}
    return np.array([counts[group] ** -0.5 for group in groups])


def fit(rows: Sequence[Observation], candidate: Candidate) -> dict[str, float]:
    """Least squares of log ratios, large ones counted linearly (Huber), by Levenberg-Marquardt."""
    table, weight = tabulate(rows), weights(rows)
    measured = np.log([o.time_s for o in rows])
    fixed, names = START | dict(candidate.fixed), candidate.free()

    def residuals(x: Array) -> Array:
        c = fixed | dict(zip(names, np.exp(x), strict=True))
        over = sum(max(0.0, c[name] - 1.0) for name in SHARES)  # a share is at most one
        return np.append(np.log(table.predict(c)) - measured, 30.0 * over)

    def cost_weights(r: Array) -> Array:
        huber = np.minimum(1.0, 0.15 / np.maximum(np.abs(r[:-1]), 1e-9)) ** 0.5
        return np.append(weight * huber, 1.0)

    x = levenberg_marquardt(residuals, cost_weights, np.log([fixed[name] for name in names]))
    return fixed | dict(zip(names, np.exp(x).tolist(), strict=True))


def levenberg_marquardt(
    residuals: Callable[[Array], Array],
    cost_weights: Callable[[Array], Array],
    x: Array,
    rounds: int = 40,
) -> Array:
    """The x with the least weighted squares; weights follow the residuals of each round."""
    damping = 1e-2
    for _ in range(rounds):
        r = residuals(x)
        w = cost_weights(r)
        steps = 1e-4 * np.eye(len(x))
        jacobian = np.array([(residuals(x + step) - r) / 1e-4 for step in steps]).T * w[:, None]
        square, gradient = jacobian.T @ jacobian, jacobian.T @ (w * r)
        while damping < 1e6:
            step = np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-9), gradient)
            new = residuals(x - np.clip(step, -0.7, 0.7))
            if np.sum((w * new) ** 2) < np.sum((w * r) ** 2):
                break
            damping *= 4
        else:
            return x
        x, damping = x - np.clip(step, -0.7, 0.7), damping / 6
        if np.abs(step).max() < 1e-4:
            return x
    return x


# ---- leaving one GPU out


CANDIDATES = (
    Candidate(
        "0.5 of the peak, 0.7 of the bandwidth",
        {
            "linear_peak": 0.5,
            "attention_peak": 0.5,
            "linear_bandwidth": 0.7,
            "attention_bandwidth": 0.7,
            "elementwise_bandwidth": 0.7,
            **HARD,
            **NO_POWER,
            **NO_HALF_RATE,
        },
        baseline=True,
    ),
    Candidate("shares, hard maximum", {**HARD, **NO_POWER, **NO_HALF_RATE}),
    Candidate("shares, smooth maximum", {**NO_POWER, **NO_HALF_RATE}),
    Candidate("shares, smooth maximum, half rate", NO_POWER),
    Candidate("shares, smooth maximum, power", NO_HALF_RATE),
    Candidate("shares, smooth maximum, power, half rate", {}),
)
SHIPPED = CANDIDATES[-1]


def left_out_errors(
    rows: Sequence[Observation], candidate: Candidate
) -> list[tuple[Observation, float]]:
    """Every observation with predicted / measured - 1, its GPU not having been fitted on."""
    errors = []
    for gpu in sorted({o.left_out_with for o in rows}):
        others = [o for o in rows if o.left_out_with != gpu]
        own = [o for o in rows if o.left_out_with == gpu]
        predicted = tabulate(own).predict(fit(others, candidate))
        errors += [(o, p / o.time_s - 1) for o, p in zip(own, predicted.tolist(), strict=True)]
    return errors


def summary(errors: Sequence[tuple[Observation, float]]) -> list[dict]:
    """One row per (GPU, phase): median and 90th percentile of the relative error, its sign, n."""
    rows = []
    for gpu in sorted({o.left_out_with for o, _ in errors}):
        for phase in PHASES:
            own = [(o.source, e) for o, e in errors if (o.left_out_with, o.phase) == (gpu, phase)]
            if own:
                e = np.array([error for _, error in own])
                rows.append(
                    {
                        "gpu": gpu,
                        "phase": phase,
                        "median": float(np.median(np.abs(e))),
                        "mean": float(np.mean(np.abs(e))),
                        "p90": float(np.percentile(np.abs(e), 90)),
                        "signed": float(np.median(e)),
                        "n": len(own),
                        "sources": sorted({source for source, _ in own}),
                    }
                )
    return rows


def median_of_gpus(rows: Sequence[dict], phase: str) -> float:
    """Median over left-out GPUs of their median error."""
    return float(np.median([row["median"] for row in rows if row["phase"] == phase]))


def mean_of_gpus(rows: Sequence[dict], phase: str) -> float:
    """Mean over left-out GPUs of their mean error: what to expect, outliers included."""
    return round(float(np.mean([row["mean"] for row in rows if row["phase"] == phase])), 3)


def document(rows: Sequence[Observation]) -> dict:
    """What `efficiency.yaml` holds."""
    c = fit(rows, SHIPPED)
    per_gpu = summary(left_out_errors(rows, SHIPPED))
    return {
        "sources": list(SOURCES),
        "num_gpus": len({o.left_out_with for o in rows}),
        "coefficients": {name: round(c[name], 4) for name in START if "helix" not in name},
        "errors": {phase: mean_of_gpus(per_gpu, phase) for phase in PHASES},
    }


def main() -> None:
    """Prints every candidate's errors, the shipped one's GPU by GPU; stores it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--write", action="store_true", help=f"store in {EFFICIENCY_PATH.name}")
    given = parser.parse_args()
    if not given.data.is_dir():
        parser.error(f"no folder {given.data}: name the one with the tables, --data FOLDER")
    rows = observations(given.data)
    for candidate in CANDIDATES:
        per_gpu = summary(left_out_errors(rows, candidate))
        fitted = fit(rows, candidate)
        print(candidate.name, {p: round(median_of_gpus(per_gpu, p), 3) for p in PHASES})
        print("  ", {name: round(fitted[name], 3) for name in candidate.free()})
        if candidate in (CANDIDATES[0], SHIPPED):
            print(*(f"   {row}" for row in per_gpu), sep="\n")
    shipped = document(rows)
    print(yaml.safe_dump(shipped, sort_keys=False))
    if given.write:
        header = "# Made by scripts/fit_efficiency.py; idea and errors: docs/device-library.md.\n"
        EFFICIENCY_PATH.write_text(header + yaml.safe_dump(shipped, sort_keys=False))


if __name__ == "__main__":
    main()
