"""Packed weights kept in a folder: found again to the bit, where nothing they depend on moved."""

import os
import shutil
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_prequantized import SIZES, write_gptq

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.packed_cache import LEFT_BEHIND_S, PackedCache
from llmpq.checkpoint.roundings import Always, GptqRoundings, rounding_key
from llmpq.errors import UserError
from llmpq.model_spec import ASSETS
from llmpq.models.raw_tensors import RawTensor
from llmpq.models.sharding import Shard
from llmpq.models.stage_model import LayerRange, load_config
from llmpq.quant import QuantizedLinear, available_precisions
from llmpq.quant.rounding import quantize, quantize_mse
from llmpq.quantizer import Quantizer
from llmpq.runtime.weights_hash import weights_hash

CPU = torch.device("cpu")
TINY_TALES = ASSETS / "tiny-tales"
LAYERS = LayerRange(0, 2, 8)
LINEARS = 7  # of a layer
FFN_SHAPE = (SIZES["intermediate_size"], SIZES["hidden_size"])


class Watched:
    """A checkpoint that remembers what was read of it."""

    def __init__(self, folder):
        self.inner, self.names = Checkpoint(folder), []

    def read(self, name, shape):
        self.names.append(name)
        return self.inner.read(name, shape)

    def read_part(self, name, shape, part):
        self.names.append(name)
        return self.inner.read_part(name, shape, part)

    def packed(self, name, shape):
        return self.inner.packed(name, shape)

    def stores(self, name):
        return self.inner.stores(name)

    def equal(self, first, second, shape):
        return self.inner.equal(first, second, shape)


@pytest.fixture
def model(tmp_path):
    """A copy of a small model, free to be changed."""
    return shutil.copytree(TINY_TALES, tmp_path / "model")


def refuse(weight, bits, group, centre_up_to=1.0):
    raise AssertionError("rounded, though it was packed before")


def load(folder, cache_folder, precisions=("4", "3"), by=quantize, key="rtn", dtype=None, **more):
    """The stage, what was read, and what the cache complained of."""
    weights, said = Watched(folder), []
    cache = PackedCache(cache_folder, weights.inner.stamp, key, said.append)
    roundings = by if hasattr(by, "of") else Always(by)
    stage = load_stage(
        load_config(folder),
        weights,
        LAYERS,
        precisions,
        dtype or torch.bfloat16,
        CPU,
        roundings=roundings,
        cache=cache,
        **more,
    )
    return stage, weights.names, said


def states(stage):
    return {
        f"{name}.{part}": tensor
        for name, linear in stage.linears().items()
        if isinstance(linear, QuantizedLinear)
        for part, tensor in linear.packed_state().items()
    }


def assert_equal(one, other):
    assert weights_hash(one) == weights_hash(other)
    left, right = states(one), states(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
    ids = torch.arange(12)[None] + 5
    hidden = [stage.run(stage.embed(ids)) for stage in (one, other)]
    assert torch.equal(*hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", ["8", "8-w8a8", "4", "3", "nf4", "8-bnb"])
def test_the_second_load_rounds_and_reads_nothing_and_is_the_same_to_the_bit(
    model, tmp_path, precision, dtype
):
    if precision not in available_precisions(CPU, dtype, optional=True):
        pytest.skip(f"{precision} is not available here")
    asked = {"precisions": [precision] * 2, "dtype": dtype}
    plain, names, _ = load(model, tmp_path / "other", **asked)
    first, read_first, said_first = load(model, tmp_path / "cache", **asked)
    second, read_second, said = load(model, tmp_path / "cache", by=refuse, **asked)
    assert_equal(plain, first)
    assert_equal(first, second)
    assert read_first == names
    assert set(names) - set(read_second) == set(first.linears())
    assert not said_first and not said


def test_a_16_bit_layer_is_read_from_the_checkpoint(model, tmp_path):
    first, names, _ = load(model, tmp_path / "cache", ["16", "4"])
    second, read, _ = load(model, tmp_path / "cache", ["16", "4"], by=refuse)
    assert_equal(first, second)
    assert len(names) - len(read) == LINEARS


def test_a_layer_is_found_wherever_its_stage_starts(model, tmp_path):
    load(model, tmp_path / "cache", ["4", "4"])
    config, weights = load_config(model), Checkpoint(model)
    cache = PackedCache(tmp_path / "cache", weights.stamp, "rtn", print)
    load_stage(
        config, weights, LayerRange(1, 2, 8), ["4"], torch.bfloat16, CPU,
        roundings=Always(refuse), cache=cache,
    )  # fmt: skip


@pytest.mark.parametrize("change", ["precision", "rounding", "moments", "dtype"])
def test_what_was_packed_otherwise_is_not_used(model, tmp_path, change):
    """The type of the model matters only where it changes the layer's class (tiles of a kernel)."""
    before, _, _ = load(model, tmp_path / "cache", ["4", "4"], key="gptq aa")
    asked = {"precisions": ["4", "4"], "key": "gptq aa"}
    asked |= {
        "precision": {"precisions": ["3", "3"]},
        "rounding": {"key": "mse"},
        "moments": {"key": "gptq bb"},
        "dtype": {"dtype": torch.float32},
    }[change]
    shapes = []

    def noted(weight, *more):
        shapes.append(tuple(weight.shape))
        return quantize(weight, *more)

    stage, _, _ = load(model, tmp_path / "cache", by=noted, **asked)
    plain, _, _ = load(model, tmp_path / "plain", **asked)
    assert_equal(stage, plain)
    old = before.linears()
    same = [n for n, s in stage.linears().items() if change == "dtype" and type(s) is type(old[n])]
    assert len(shapes) == 2 * LINEARS - len(same)


def change_weight(model, name):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] += 1
    times = path.stat()
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_changed_checkpoint_is_noticed_even_if_its_size_and_date_are_the_same(model, tmp_path):
    """Only what really changed is rounded again."""
    load(model, tmp_path / "cache")
    before = (model / "model.safetensors").stat()
    name = "model.layers.0.mlp.up_proj.weight"
    change_weight(model, name)
    after = (model / "model.safetensors").stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    rounded = []

    def noted(weight, *more):
        rounded.append(tuple(weight.shape))
        return quantize(weight, *more)

    stage, _, _ = load(model, tmp_path / "cache", by=noted)
    plain, _, _ = load(model, tmp_path / "plain")
    assert_equal(stage, plain)
    assert rounded == [tuple(stage.linears()[name].raw_shapes["weight"])]


def test_a_copied_checkpoint_is_read_but_not_rounded_again(model, tmp_path):
    first, names, _ = load(model, tmp_path / "cache")
    copy = shutil.copytree(model, tmp_path / "copy")
    second, read, _ = load(copy, tmp_path / "cache", by=refuse)
    third, read_less, _ = load(copy, tmp_path / "cache", by=refuse)
    assert_equal(first, second)
    assert_equal(first, third)
    assert read == names and len(read_less) < len(names)


def test_gptq_is_told_apart_by_the_moments_it_used(tmp_path):
    given = Quantizer(method="gptq", moments="m", sha256="ab")
    assert rounding_key(given) == "gptq ab"
    (tmp_path / "m").write_bytes(b"one")
    (tmp_path / "n").write_bytes(b"two")
    unnamed = Quantizer(method="gptq", moments="m")
    keys = [
        rounding_key(unnamed, base=tmp_path / "plan.json"),
        rounding_key(unnamed, tmp_path / "n"),
    ]
    assert len(set(keys)) == 2 and all(len(key.split()[1]) == 64 for key in keys)
    assert rounding_key(Quantizer(method="mse")) == "mse"


def test_gptq_finds_its_codes_again(model, tmp_path):
    class Moments:
        def key(self, name):
            return name

        def statistics(self, name):
            columns = Checkpoint(model).tensor(name).shape[1]
            x = torch.randn(256, columns, generator=torch.Generator().manual_seed(1))
            return (x.t() @ x / 256)[None]

    first, _, _ = load(model, tmp_path / "cache", by=GptqRoundings(Moments()), key="gptq aa")
    second, _, _ = load(model, tmp_path / "cache", by=refuse, key="gptq aa")
    nearest, _, _ = load(model, tmp_path / "cache", key="rtn")
    assert_equal(first, second)
    assert weights_hash(nearest) != weights_hash(first)


@pytest.mark.parametrize("own", [{"bits": 4}, {"bits": 8, "group": -1}])
def test_weights_that_came_quantized_are_kept_only_where_they_are_rounded_again(tmp_path, own):
    (tmp_path / "model").mkdir()
    write_gptq(tmp_path / "model", **own)
    config, weights = load_config(tmp_path / "model"), Checkpoint(tmp_path / "model")
    layers = LayerRange(0, config.num_hidden_layers, config.num_hidden_layers)

    def load_at(precision, by):
        cache = PackedCache(tmp_path / "cache", weights.stamp, "rtn", print)
        precisions = [precision] * layers.total
        more = {"roundings": Always(by), "cache": cache}
        return load_stage(config, weights, layers, precisions, torch.float32, CPU, **more)

    load_at(str(own["bits"]), refuse)
    assert not packed_files(tmp_path / "cache")
    first, second = load_at("3", quantize), load_at("3", refuse)
    assert weights_hash(first) == weights_hash(second)


def test_bytes_of_tensors_are_told_from_headers_alone(tmp_path):
    write_gptq(tmp_path)
    weights = Checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    up = "model.layers.0.mlp.up_proj"
    parts = [tensor for name, tensor in stored.items() if name.startswith(up)]
    assert len(parts) == 4
    assert weights.stored_bytes(f"{up}.weight", FFN_SHAPE) == sum(part.nbytes for part in parts)
    norm = stored["model.norm.weight"]
    assert weights.stored_bytes("model.norm.weight", tuple(norm.shape)) == norm.nbytes
    with pytest.raises(UserError, match="config.json implies"):
        weights.stored_bytes("model.norm.weight", (7,))
    with pytest.raises(UserError, match="no tensor 'model.none'"):
        weights.stored_bytes("model.none", (7,))


def test_bytes_of_tensors_in_a_pytorch_file(model):
    tensors = load_file(model / "model.safetensors")
    torch.save(tensors, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    name, weights = "model.layers.1.mlp.up_proj.weight", Checkpoint(model)
    assert weights.stored_bytes(name, tuple(tensors[name].shape)) == tensors[name].nbytes


def packed_files(folder):
    return sorted(folder.glob("*.safetensors"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def overwrite(path):
    path.write_bytes(os.urandom(path.stat().st_size))


def rename(path):
    """Sound tensors under another name."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = {f"other_{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, about)


def swap(path):
    other = next(p for p in packed_files(path.parent) if p != path)
    shutil.copy(other, path)


@pytest.mark.parametrize("damage", [cut, flip, empty, overwrite, rename, swap])
def test_a_damaged_file_is_told_of_and_made_anew(model, tmp_path, damage):
    first, _, _ = load(model, tmp_path / "cache")
    path = packed_files(tmp_path / "cache")[3]
    sound = path.read_bytes()
    damage(path)
    second, _, said = load(model, tmp_path / "cache")
    assert len(said) == 1 and str(path) in said[0]
    assert_equal(first, second)
    assert path.read_bytes() == sound
    _, _, said = load(model, tmp_path / "cache", by=refuse)
    assert not said


def test_a_damaged_memory_of_the_checkpoint_only_costs_a_reading(model, tmp_path):
    first, names, _ = load(model, tmp_path / "cache")
    notes = sorted((tmp_path / "cache").glob("*.sha256"))
    assert len(notes) == 2 * LINEARS
    for number, note in enumerate(notes):
        note.write_bytes([b"", b"\xff\x00", b"0" * 64][number % 3])
    second, read, _ = load(model, tmp_path / "cache", by=refuse)
    assert_equal(first, second)
    assert read == names
    assert len(load(model, tmp_path / "cache", by=refuse)[1]) < len(names)


@pytest.mark.parametrize("precision", ["8", "4", "3"])
def test_workers_that_share_a_stage_find_their_own_parts(model, tmp_path, precision):
    asked = {"precisions": [precision] * 2, "dtype": torch.float32}
    parts = [load(model, tmp_path / "cache", shard=Shard(i, 3), **asked)[0] for i in range(3)]
    again = [
        load(model, tmp_path / "cache", by=refuse, shard=Shard(i, 3), **asked)[0] for i in range(3)
    ]
    assert len(packed_files(tmp_path / "cache")) == 3 * 2 * LINEARS
    hashes = [weights_hash(stage) for stage in parts]
    assert hashes == [weights_hash(stage) for stage in again]
    assert len(set(hashes)) == 3


def test_two_threads_that_keep_the_same_weight_leave_a_whole_file(model, tmp_path):
    stage, _, _ = load(model, tmp_path / "plain")
    name, linear = next(iter(stage.linears().items()))
    raw = RawTensor(name, linear, "weight", linear.raw_shapes["weight"])
    weight, failures = Checkpoint(model).tensor(name), []

    def keep_often():
        for source in range(20):
            cache = PackedCache(tmp_path / "cache", str(source), "rtn", failures.append)
            cache.fill(raw, name, lambda: weight, lambda tensor: None)

    threads = [threading.Thread(target=keep_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(packed_files(tmp_path / "cache")) == 1
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--cache-dir DIR"):
            PackedCache(folder, "", "rtn", print)


def test_a_folder_that_is_lost_on_the_way_does_not_end_the_run(model, tmp_path):
    weights, said, cache = Checkpoint(model), [], tmp_path / "cache"
    kept = PackedCache(cache, weights.stamp, "rtn", said.append)
    shutil.rmtree(cache)
    cache.write_text("")
    config = load_config(model)
    load_stage(config, weights, LAYERS, ["4", "3"], torch.bfloat16, CPU, cache=kept)
    assert any("are not kept" in line for line in said)
    assert sum("are not kept" in line for line in said) == 1


def test_what_killed_writers_left_is_removed_when_it_is_old(tmp_path):
    old, young = tmp_path / "a.part", tmp_path / "b.part"
    for path in (old, young):
        path.write_bytes(b"half")
    before = old.stat().st_mtime - 2 * LEFT_BEHIND_S
    os.utime(old, (before, before))
    PackedCache(tmp_path, "", "rtn", print)
    assert not old.exists() and young.exists()


def test_other_quantizers_give_other_weights(model, tmp_path):
    """So that a wrong hit would be seen by the tests above."""
    one, _, _ = load(model, tmp_path / "a")
    other, _, _ = load(model, tmp_path / "b", by=quantize_mse, key="mse")
    assert weights_hash(one) != weights_hash(other)
