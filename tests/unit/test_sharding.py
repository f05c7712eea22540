"""Stages whose devices share every layer: shards compute and hold what one device would."""

import sys
import threading
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from test_prequantized import write_gptq
from transformers import AutoConfig, LlamaConfig

from llmpq.checkpoint.checkpoint import Checkpoint, RandomWeights
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.roundings import BY_METHOD
from llmpq.errors import UserError, WorkerError
from llmpq.job import Job, LaneShape, Member
from llmpq.model_lookup import spec_from_config
from llmpq.models.lanes import LaneCache
from llmpq.models.sharding import ALONE, Shard, Sharding
from llmpq.models.stage_model import LayerRange, load_config
from llmpq.quant import (
    INPUTS,
    OUTPUTS,
    PackedWeight,
    TensorPart,
    available_precisions,
    keep_codes,
    linear_factory,
)
from llmpq.quant.gptq import Gptq
from llmpq.runtime.shard_group import LocalShardHub

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))
from families import SHAREABLE, TINY_TALES, build  # noqa: E402

CPU, FP32 = torch.device("cpu"), torch.float32
MIXED = ["16", "8", "4", "3"]
TOKENS = torch.tensor([[17, 9, 41, 0, 0], [5, 33, 90, 4, 96]])
LENGTHS = [3, 5]
ALL = LayerRange(0, 4, 4)
NEXT = torch.tensor([[11], [60]])


@pytest.fixture(autouse=True)
def alone(one_thread):
    """Products are tiny."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """family -> a checkpoint with random weights."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        build(family).save_pretrained(folder)
        return folder

    return cache(make)


def load(folder, shard=ALONE, group=None, precisions="16", layers=ALL, **more):
    """A stage of a checkpoint, or one shard of it."""
    wanted = (
        [precisions] * (layers.end - layers.first) if isinstance(precisions, str) else precisions
    )
    weights = more.pop("weights", None) or Checkpoint(folder)
    config, dtype = load_config(folder), more.pop("dtype", FP32)
    return load_stage(config, weights, layers, wanted, dtype, CPU, shard=shard, group=group, **more)


def shards_of(folder, count, **more):
    """All shards of a stage, connected."""
    groups = LocalShardHub(count).groups()
    return [load(folder, Shard(g.rank, count), g, **more) for g in groups]


def together(stages, work):
    """`work(stage)` on every stage at once, each in a thread."""
    results: list = [None] * len(stages)

    def run(index):
        try:
            with torch.inference_mode():
                results[index] = work(stages[index])
        except BaseException as error:  # handed to the test
            results[index] = error
            group = stages[index].group
            if group is not None:
                group._hub.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(stages))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(results, key=lambda r: isinstance(r, WorkerError)):
        if isinstance(error, BaseException):
            raise error
    return results


def forward(stage, cached=True):
    """States and logits of unequal prompts and of two tokens more for each, `[2, 7, ...]`."""
    cache = LaneCache(stage.layers.count, [LaneShape(2, 9)], stage.windows)
    columns = torch.tensor(LENGTHS)
    members = tuple(Member(0, row, length, row, 0) for row, length in enumerate(LENGTHS))
    view = cache.prefill(Job(True, members, 0, 5, 2), 0, 2, CPU) if cached else None
    calls = [(TOKENS, torch.arange(5).expand(2, -1), view)]
    if cached:
        for step in range(2):
            at = columns + step
            job = Job(False, tuple(m._replace(position=step + 1) for m in members), 0, 8, 2)
            view = cache.step(0, range(2), 8, at, torch.tensor(cache.step_tokens(job, 2)))
            calls.append((NEXT + step, at[:, None], view))
    states, logits = [], []
    for tokens, positions, view in calls:
        ids = tokens.clone() if stage.shard.leads else torch.zeros_like(tokens)
        hidden = stage.run(stage.embed(ids), positions, view)
        states.append(hidden)
        logits.append(stage.head(hidden))
    return torch.cat(states, 1), torch.cat(logits, 1)


def assert_alike(ours, theirs, tolerance=1e-5):
    for mine, other in zip(ours, theirs, strict=True):
        scale = max(1.0, float(other.abs().max()))
        assert float((mine - other).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", SHAREABLE)
def test_shards_compute_what_one_device_does(folder_of, family, count):
    folder = folder_of(family)
    for work in (forward, partial(forward, cached=False)):
        [alone] = together([load(folder)], work)
        shared = together(shards_of(folder, count), work)
        for results in shared:
            assert_alike(results, alone)
            assert all(map(torch.equal, results, shared[0]))  # the same bits on every shard


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("precisions", ["8", "4", "3", MIXED])
@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gpt_neox", "gemma3"])
def test_shards_compute_alike_at_every_precision(folder_of, family, precisions, count):
    folder = folder_of(family)
    [alone] = together([load(folder, precisions=precisions)], forward)
    shared = together(shards_of(folder, count, precisions=precisions), forward)
    for results in shared:
        assert_alike(results, alone)
    assert not torch.allclose(alone[0], together([load(folder)], forward)[0][0], atol=1e-3)


@pytest.mark.parametrize("layers", [LayerRange(0, 2, 4), LayerRange(1, 3, 4), LayerRange(2, 4, 4)])
def test_a_stage_in_the_middle_is_shared_too(folder_of, layers):
    folder = folder_of("qwen2")  # its head is tied to the embedding

    def work(stage):
        hidden = stage.embed(TOKENS) if layers.is_first else torch.ones(2, 5, 32)
        hidden = stage.run(hidden)
        return hidden, stage.head(hidden) if layers.is_last else hidden

    [alone] = together([load(folder, layers=layers)], work)
    for results in together(shards_of(folder, 4, layers=layers), work):
        assert_alike(results, alone)


def test_tokens_are_embedded_by_whoever_holds_them():
    """Bit by bit, the padding token of a high number among them; the last part is smaller."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, pad_token_id=96, num_hidden_layers=2, **sizes)

    def stage(shard, group=None):
        first = LayerRange(0, 1, 2)
        return load_stage(
            config, RandomWeights(), first, ["16"], FP32, CPU, shard=shard, group=group
        )

    ids = torch.arange(97)[None]
    [alone] = together([stage(ALONE)], lambda stage: stage.embed(ids))
    groups = LocalShardHub(4).groups()
    shards = [stage(Shard(group.rank, 4), group) for group in groups]
    for embedded in together(shards, lambda stage: stage.embed(ids.clone())):
        assert torch.equal(embedded, alone)


# ---- what a shard holds


def part_of_weight(whole, part):
    weight = whole.dequantized_weight()
    return weight if part is None else part.of(weight)


def moments_of(in_features):
    x = torch.randn(300, in_features, generator=torch.Generator().manual_seed(5))
    x = x + x.roll(1, 1)
    return (x.t() @ x / len(x))[None]


@pytest.mark.parametrize("rounding", [*BY_METHOD, "gptq"])
@pytest.mark.parametrize("precision", ["8", "4", "3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "dim, whole, count",
    [
        (OUTPUTS, 256, 2),
        (INPUTS, 512, 2),  # groups of 128, whole ones
        (INPUTS, 512, 4),
        (INPUTS, 384, 2),  # 192: groups of 64 within those of 128
        (INPUTS, 320, 2),  # 160: a group of 64 is cut in two
        (INPUTS, 96, 2),  # one group a row
        (INPUTS, 128, 4),
    ],
)
def test_parts_have_the_codes_of_the_whole_matrix(dim, whole, count, dtype, precision, rounding):
    shape = (whole, 192) if dim == OUTPUTS else (192, whole)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    round_by = {**BY_METHOD, "gptq": Gptq(moments_of(shape[1]))}
    bias = torch.arange(shape[0]) / 7
    like = {"bias": True, "dtype": dtype, "device": CPU}
    one = linear_factory(precision, shape[1], shape[0], **like)()
    one.load_weight("weight", weight, round_by[rounding])
    for index in range(count):
        step = whole // count
        part = TensorPart(dim, index * step, (index + 1) * step, whole)
        out_features, in_features = part.of_shape(shape)
        own = linear_factory(precision, in_features, out_features, **like, part=part)()
        for name, tensor in (("weight", weight), ("bias", bias)):
            wanted = own.part_to_read(name, round_by[rounding])
            own.load_weight(name, wanted.of(tensor) if wanted else tensor, round_by[rounding])
        assert torch.equal(own.dequantized_weight(), part_of_weight(one, part))
        assert own.bias.shape == (out_features,)
        x = torch.randn(3, in_features).to(dtype)
        wanted_out = x.float() @ part_of_weight(one, part).float().t() + own.bias.float()
        assert torch.allclose(own(x).float(), wanted_out, atol=0.5 if dtype != FP32 else 1e-3)


@pytest.mark.parametrize("precision", ["8-w8a8", "nf4", "8-bnb"])
@pytest.mark.parametrize("dim", [OUTPUTS, INPUTS])
def test_parts_of_other_precisions_have_the_codes_too(precision, dim):
    if precision not in available_precisions(CPU, torch.bfloat16, optional=True):
        pytest.skip(f"{precision} is not available here")
    weight = torch.randn(128, 256).to(torch.bfloat16)
    like = {"bias": False, "dtype": torch.bfloat16, "device": CPU}
    one = linear_factory(precision, 256, 128, **like)()
    one.load_weight("weight", weight)
    for index in range(2):
        size = weight.shape[dim] // 2
        part = TensorPart(dim, index * size, (index + 1) * size, 2 * size)
        out_features, in_features = part.of_shape((128, 256))
        own = linear_factory(precision, in_features, out_features, **like, part=part)()
        wanted = own.part_to_read("weight")
        own.load_weight("weight", wanted.of(weight) if wanted else weight)
        assert torch.equal(own.dequantized_weight(), part_of_weight(one, part))


@pytest.mark.parametrize("group_of", [None, "scattered"])
@pytest.mark.parametrize("groups", [1, 4, 2])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dim", [OUTPUTS, INPUTS])
def test_parts_keep_the_codes_of_quantized_checkpoints(dim, bits, groups, group_of):
    codes = torch.randint(0, 2**bits, (64, 192), dtype=torch.uint8)
    scales, zeros = torch.rand(64, groups) + 0.1, torch.full((64, groups), 3, dtype=torch.uint8)
    own_groups = None if group_of is None else (torch.arange(192) % groups).int()
    packed = PackedWeight(bits, codes, scales.half(), zeros, own_groups)
    for index in range(4):
        size = codes.shape[dim] // 4
        part = TensorPart(dim, index * size, (index + 1) * size, 4 * size)
        out_features, in_features = part.of_shape((64, 192))
        layer = linear_factory(
            str(bits),
            in_features,
            out_features,
            bias=False,
            dtype=torch.half,
            device=CPU,
            part=part,
        )()
        held = keep_codes(layer, packed)
        assert torch.equal(held.dequantized_weight(), part.of(packed.dequantized()))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("precision", ["4", "3"])
def test_shards_compute_with_a_quantized_checkpoint(tmp_path, precision, ordered):
    """At its own 4 bits it keeps the codes; 3 bits are rounded from what they stand for."""
    folder = write_gptq(tmp_path, bits=4, group=64, ordered=ordered).folder
    more = {"precisions": precision, "layers": LayerRange(0, 2, 2)}

    def work(stage):
        return (stage.run(torch.ones(2, 5, 128).cumsum(1)),)

    alone = load(folder, **more)
    shards = shards_of(folder, 2, **more)
    for stage in shards:
        for name, linear in stage.linears().items():
            whole = alone.linears()[name].dequantized_weight()
            assert torch.equal(linear.dequantized_weight(), linear.part.of(whole))
    [wanted] = together([alone], work)
    for results in together(shards, work):
        assert_alike(results, wanted)


def test_every_shard_has_its_part_of_the_stage(folder_of):
    """Put together again, shards hold the weights of one device, key-value heads repeated."""
    folder = folder_of("llama")
    alone = load(folder, precisions=MIXED).linears()
    for count in (2, 4):
        for shard in (Shard(index, count) for index in range(count)):
            stage = load(folder, shard, precisions=MIXED)
            for name, linear in stage.linears().items():
                assert linear.part is not None
                own = linear.dequantized_weight()
                assert torch.equal(own, linear.part.of(alone[name].dequantized_weight())), name
                heads = 2 if ("k_proj" in name or "v_proj" in name) else count
                number = shard.index * heads // count
                assert linear.part.start == number * linear.part.whole // heads


def test_biases_of_sums_are_added_once(folder_of):
    stages = [load(folder_of("opt"), Shard(index, 2)) for index in range(2)]
    biased = [{n for n, m in stage.linears().items() if m.bias is not None} for stage in stages]
    summed = {n for n in biased[0] if "out_proj" in n or "fc2" in n}
    assert biased[0] - biased[1] == summed and len(summed) == 8


class CountedReads(Checkpoint):
    """Counts the bytes that are asked for."""

    num_bytes = 0

    def _read(self, path, name, part=None):
        tensor = super()._read(path, name, part)
        self.num_bytes += tensor.nbytes
        return tensor


def test_a_shard_reads_only_its_own_bytes(folder_of):
    folder = folder_of("llama")
    whole, half = CountedReads(folder), CountedReads(folder)
    load(folder, weights=whole)
    stage = load(folder, Shard(1, 2), weights=half)
    assert half.num_bytes == stage.weight_bytes()
    norms = 9 * 32 * 4
    assert half.num_bytes - norms == pytest.approx((whole.num_bytes - norms) / 2, rel=0.01)


@pytest.mark.parametrize("precision, whole", [("4", []), ("8", ["down_proj", "o_proj"])])
def test_whole_rows_are_read_only_where_grids_are(precision, whole):
    class Noted(RandomWeights):
        names: list[str] = []

        def read(self, name, shape):
            self.names.append(name.split(".")[-2])
            return super().read(name, shape)

        def read_part(self, name, shape, part):
            return part.of(RandomWeights.read(self, name, shape))

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    config, weights = LlamaConfig(num_hidden_layers=3, **sizes), Noted()
    load_stage(config, weights, LayerRange(1, 2, 3), [precision], FP32, CPU, shard=Shard(1, 2))
    assert sorted(name for name in weights.names if "norm" not in name) == whole


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_is_read_as_the_whole_is(folder_of, tmp_path, dim):
    folder, name = folder_of("opt"), "model.decoder.layers.1.fc1.weight"
    whole = Checkpoint(folder).read(name, (64, 32))
    part = TensorPart(dim, 8, 24, (64, 32)[dim])
    assert torch.equal(Checkpoint(folder).read_part(name, (64, 32), part), part.of(whole))
    torch.save({name: whole}, tmp_path / "pytorch_model.bin")
    assert torch.equal(Checkpoint(tmp_path).read_part(name, (64, 32), part), part.of(whole))
    random = RandomWeights()
    assert torch.equal(random.read_part(name, (64, 32), part), part.of(random.read(name, (64, 32))))
    with pytest.raises(
        UserError, match=r"has shape \[64, 32\], but config.json implies \[64, 16\]"
    ):
        Checkpoint(folder).read_part(name, (64, 16), part)


@pytest.mark.parametrize("precision", ["16", "8", "4", "3"])
@pytest.mark.parametrize("count", [2, 4])
def test_shards_hold_about_what_the_planner_counts(count, precision):
    """Biases are cut, which the planner counts in full; the rest is as it says."""
    from llmpq.costs.memory import end_weight_bytes, layer_weight_bytes

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1000,
    )
    spec = spec_from_config(config.to_dict(), "wide").shard(count)
    planned = 2 * layer_weight_bytes(spec, precision) + end_weight_bytes(
        spec, first=True, last=True
    )
    stage = load_stage(
        config,
        RandomWeights(),
        LayerRange(0, 2, 2),
        [precision] * 2,
        torch.bfloat16,
        CPU,
        shard=Shard(0, count),
    )
    assert stage.weight_bytes() == planned


# ---- what cannot be


def test_families_that_are_not_known_are_refused():
    config = AutoConfig.for_model("cohere", num_hidden_layers=2)
    with pytest.raises(UserError, match="among 2 devices; supported: bloom, gemma2"):
        Sharding(config, Shard(0, 2))
    Sharding(config, ALONE)  # one device needs to know nothing


def test_heads_that_cannot_be_cut_are_named():
    with pytest.raises(UserError, match="3 key-value heads can be neither cut nor repeated for 2"):
        Sharding(load_config(TINY_TALES), Shard(0, 2))
    narrow = LlamaConfig(num_attention_heads=4, num_key_value_heads=1, hidden_size=64)
    with pytest.raises(UserError, match="attention heads 4 cannot be cut into 8 equal parts"):
        Sharding(narrow, Shard(0, 8))


def test_a_shard_that_fails_wakes_the_others():
    hub = LocalShardHub(2)
    groups = hub.groups()
    threading.Timer(0.05, hub.abort).start()
    with pytest.raises(WorkerError, match="shard 1: another shard has stopped"):
        groups[1].all_reduce(torch.ones(2))


# ---- real processes
