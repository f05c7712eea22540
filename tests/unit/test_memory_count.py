"""What a model holds, counted on its own modules, against what the planner takes from tables."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoConfig  # noqa: E402

from llmpq import model_lookup  # noqa: E402
from llmpq.costs import memory, peak  # noqa: E402
from llmpq.errors import UserError  # noqa: E402
from llmpq.evaluation import judge  # noqa: E402
from llmpq.families import FAMILIES  # noqa: E402
from llmpq.job import LaneShape  # noqa: E402
from llmpq.machine import INT4_TILES, VNNI, Machine, cpu, host_cpu  # noqa: E402
from llmpq.model_lookup import load_model_spec  # noqa: E402
from llmpq.model_spec import ALL_HEADS, ASSETS, LinearShape, ModelSpec  # noqa: E402
from llmpq.models import count  # noqa: E402
from llmpq.models.count_families import NAMED, WHOLE, count_family, families_text  # noqa: E402
from llmpq.models.count_model import count_model  # noqa: E402
from llmpq.models.stage_model import LayerRange, StageModel, load_config  # noqa: E402
from llmpq.quant import available_precisions, linear_factory, machine_here  # noqa: E402
from llmpq.quant.linear import TiledLinear  # noqa: E402
from llmpq.runtime.rehearsal import peak_bytes  # noqa: E402
from llmpq.runtime.transport import HEADER_BYTES  # noqa: E402

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 64,
    "pad_token_id": 0,
}
MLA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
UNLISTED = ("granite", "phi3")
SIZED = {name: row for name, row in FAMILIES.items() if row.sizes}


def folder_of(model_type: str, folder: Path, **changes: Any) -> Path:
    """A model's folder with nothing but its configuration."""
    config = AutoConfig.for_model(model_type, **SIZES, **changes)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def test_messages_have_the_headers_that_are_counted() -> None:
    assert memory.HEADER_BYTES == HEADER_BYTES


@pytest.mark.parametrize("shape", [(256, 256), (704, 256), (256, 704), (97, 64), (2304, 512)])
def test_a_linear_takes_what_is_predicted(shape: tuple[int, int]) -> None:
    out, cols = shape
    here = machine_here(CPU, torch.bfloat16)
    for precision, biased in product(available_precisions(CPU, torch.bfloat16), (False, True)):
        layer = linear_factory(
            precision, cols, out, bias=biased, dtype=torch.bfloat16, device=CPU
        )()
        fill(layer, out, cols, biased)
        for rows in (1, 17, 65):
            check(layer, precision, rows, biased, here)


@pytest.mark.parametrize("bits", [3, 4])
def test_tiles_that_are_taken_apart_take_what_is_predicted(bits: int) -> None:
    layer = TiledLinear(704, 256, False, torch.bfloat16, CPU, bits)
    fill(layer, 256, 704, False)
    for rows in (65, 300):
        check(layer, str(bits), rows, False, cpu({INT4_TILES}))


def fill(layer: Any, out: int, cols: int, biased: bool) -> None:
    layer.load_weight("weight", torch.randn(out, cols))
    if biased:
        layer.load_weight("bias", torch.randn(out))


def check(layer: Any, precision: str, rows: int, biased: bool, here: Machine) -> None:
    x = torch.randn(1, rows, layer.in_features).to(torch.bfloat16)
    with torch.inference_mode():
        layer(x)
        measured = peak_bytes(lambda: layer(x), CPU)
    op = LinearShape(name="x", out_features=layer.out_features, in_features=layer.in_features)
    predicted = peak.linear_bytes(precision, op, rows, biased=biased, machine=here)
    assert measured <= predicted <= 1.05 * measured, (precision, rows, biased)


def test_the_cpu_is_known(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t\t: fpu avx512f avx512bw avx512dq avx512vl\n")
    assert host_cpu(info) == cpu({INT4_TILES})
    info.write_text("flags\t\t: fpu avx512f avx512bw avx512dq avx512vl avx512_vnni\n")
    assert host_cpu(info) == cpu({INT4_TILES, VNNI})
    other = tmp_path / "other"
    other.write_text("flags\t\t: fpu avx2\n")
    assert host_cpu(other) == cpu(())
    assert host_cpu(tmp_path / "none") == cpu(())


def test_the_table_that_ships_has_every_family() -> None:
    table = json.loads((ASSETS / "activations.json").read_text())
    names = {f"{name}{rest}" for name in SIZED for rest in ("", f", {ALL_HEADS}")}
    filled = {f"{name}, {ALL_HEADS}" for name, row in SIZED.items() if row.heads_fill_hidden}
    assert set(table) == names - filled


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZED)
def test_the_table_that_ships_is_the_count(family: str) -> None:
    """With grouped key-value heads; all of it by `python -m llmpq.models.count_families`."""
    table = json.loads((ASSETS / "activations.json").read_text())
    sizes = WHOLE if SIZED[family].heads_fill_hidden else NAMED
    counted = json.loads(families_text({family: count_family(family, sizes)}))
    assert counted[family] == table[family]


@pytest.mark.parametrize("family", SIZED)
def test_a_familys_variants_have_its_window(family: str) -> None:
    """Attention within a window needs a mask of its own, which the table must count."""
    configs = [AutoConfig.for_model(family, **variant) for variant in SIZED[family].variants]
    if hasattr(configs[0], "sliding_window"):
        assert any(map(has_window, configs)), "`variants` has no entry with a window"


def has_window(config: Any) -> bool:
    """Whether some layer attends to no more than the last tokens."""
    if kinds := getattr(config, "layer_types", None):
        return "sliding_attention" in kinds
    return config.sliding_window is not None


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt"])
def test_a_familys_table_is_the_count_of_a_model(model_type: str, tmp_path: Path) -> None:
    """At sizes that the table was not made with, in every place, to the byte."""
    folder = folder_of(model_type, tmp_path)
    spec, config = load_model_spec(str(folder)), load_config(folder)
    shape = count.MicroBatchShape(3, 20, 20)
    whole = count.with_layers(config, count.NUM_LAYERS)
    for first, last in product((True, False), repeat=2):
        layers = LayerRange(0 if first else 1, 7 if last else 6, 7)
        met = [
            (s, sum(n * k for n, k in s.live.items()))
            for s in count.snapshots(whole, layers, shape)
        ]
        plain = max(size for snapshot, size in met if not snapshot.op)
        predicted = memory.prefill_bytes(spec, 3, 20, first=first, last=last, machine=cpu(()))
        assert plain <= predicted <= 1.03 * plain


@pytest.mark.parametrize("model_type", UNLISTED)
def test_an_unlisted_family_is_counted(model_type: str, tmp_path: Path) -> None:
    spec = count_model(folder_of(model_type, tmp_path))
    whole = LayerRange(0, 2, 2)
    stage = StageModel(
        load_config(tmp_path), whole, ["16"] * 2, torch.bfloat16, torch.device("meta")
    )
    params = sum(p.numel() for p in stage.model.parameters())
    ends = spec.embedding_params + spec.head_params + spec.final_params
    assert spec.num_layers * spec.layer_params + ends == params
    assert (spec.num_kv_heads, spec.head_dim, spec.guessed) == (2, 16, False)
    assert spec.activations is not None
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    sizes = memory.RunSizes((LaneShape(4, 40),), 2, 30, 30, num_stages=1)
    held = memory.stage_memory(spec, ["16", "4"], first=True, last=True, sizes=sizes)
    assert held.activations > 2 * 30 * 64 * 2


def test_the_count_is_kept_and_a_broken_one_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = folder_of("granite", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    guess = model_lookup.spec_from_config(config, "any").model_copy(update={"guessed": False})
    answer = guess.model_dump_json().encode()
    calls: list[list[str]] = []

    def runs(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, answer)

    monkeypatch.setattr(model_lookup.subprocess, "run", runs)
    first, second = load_model_spec(str(folder)), load_model_spec(str(folder))
    assert first == second and first.name == str(folder) and not first.guessed
    assert calls == [[sys.executable, "-m", "llmpq.evaluation.judge", str(folder / "config.json")]]
    (kept,) = (tmp_path / "cache" / "llmpq").iterdir()
    kept.write_text("{broken")
    assert load_model_spec(str(folder)) == first and len(calls) == 2
    assert kept.read_bytes() == answer, "and is written anew"


def test_what_cannot_be_judged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("granite", tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "file"))
    failed = subprocess.CompletedProcess([], 2, b"", b"noise\n" + b"too odd " * 100)
    monkeypatch.setattr(model_lookup.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"config.json: (too odd )+.*\.\.\.$") as caught:
        load_model_spec(str(folder))
    assert len(str(caught.value)) <= 300
    monkeypatch.setattr(model_lookup, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install 'llmpq\\[run\\]'"):
        load_model_spec(str(folder))


LLAMA_SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "codegen"}, "'codegen' have a layout that llmpq does not know"),
        ({"model_type": "fuyu"}, "their text model is of another type ('persimmon')"),
        ({"model_type": "baichuan"}, "has no models of type 'baichuan'"),
        (
            {**LLAMA_SHAPE, "num_key_value_heads": 2, "model_type": "doge"},
            "'doge' are not supported",
        ),
        ({**LLAMA_SHAPE, "num_key_value_heads": 3}, "this 'llama' model is not supported"),
        (
            {"model_type": "qwen3_5_text", **MLA},
            "keep a state that is not keys and values ('layer_types' has 'linear_attention')",
        ),
    ],
)
def test_a_model_that_cannot_be_served_is_one_line(
    config: dict[str, Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["judge", str(tmp_path / "config.json")])
    assert judge.main() == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert words in said
