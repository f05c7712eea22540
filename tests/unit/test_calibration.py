"""Calibration statistics: measured on a running stage, written, read, and used to load weights."""

import json
import math
import os
import weakref
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from llmpq.checkpoint import roundings
from llmpq.checkpoint.calibration_file import CalibrationFile, sha256_of, write_calibration
from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.roundings import BY_METHOD, GptqRoundings, load_roundings
from llmpq.errors import UserError
from llmpq.evaluation.calibration import CalibrationMeter, block_columns
from llmpq.model_spec import ASSETS
from llmpq.models.stage_model import LayerRange, load_config
from llmpq.precision import group_size
from llmpq.quant.gptq import Gptq
from llmpq.quant.rounding import quantize, quantize_mse
from llmpq.quantizer import Method, Quantizer

CPU = torch.device("cpu")
TINY_TALES = ASSETS / "tiny-tales"
LAYERS = LayerRange(3, 5, 8)
GATE, UP = (f"model.layers.4.mlp.{name}_proj.weight" for name in ("gate", "up"))


def two_layers(precision: str = "16", by=roundings.NEAREST):
    config, weights = load_config(TINY_TALES), Checkpoint(TINY_TALES)
    return load_stage(config, weights, LAYERS, [precision] * 2, torch.float32, CPU, roundings=by)


@torch.inference_mode()
def measured(block: int | None = None):
    """A meter that has seen 400 tokens in two calls, and the inputs of the last layer's gate."""
    stage, inputs = two_layers(), []
    stage.linears()[GATE].register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1)))
    generator = torch.Generator().manual_seed(0)
    with CalibrationMeter(stage, block) as meter:
        for rows in (3, 1):
            hidden = torch.randn(rows, 100, 192, generator=generator)
            stage.run(
                hidden,
            )
    stage.run(
        hidden,
    )  # not seen any more
    return meter, torch.cat(inputs[:2])


@pytest.fixture(scope="module")
def meter():
    return measured()[0]


@pytest.fixture(scope="module")
def path(meter, tmp_path_factory):
    path = tmp_path_factory.mktemp("moments") / "deep" / "tiny.moments.safetensors"
    write_calibration(
        path, meter.statistics(), meter.keys, {"model": "tiny-tales", "tokens": "400"}
    )
    return path


# Measuring


def test_a_meter_measures_the_mean_second_moment():
    meter, inputs = measured()
    assert meter.num_tokens == len(inputs) == 400
    moments = meter.statistics()[meter.keys[GATE]]
    assert moments.shape == (1, 192, 192) and moments.dtype == torch.float32
    assert torch.allclose(moments[0], inputs.t() @ inputs / 400, rtol=1e-4, atol=1e-5)


def test_linears_with_the_same_input_share_one(meter):
    assert len(meter.keys) == 2 * 7
    assert set(meter.keys) == set(two_layers().linears())
    assert meter.keys[GATE] == meter.keys[UP] == GATE
    attention = [meter.keys[f"model.layers.3.self_attn.{n}_proj.weight"] for n in "qkvo"]
    assert len(set(attention[:3])) == 1 and attention[3] != attention[0]
    assert set(meter.statistics()) == set(meter.keys.values())
    assert len(meter.statistics()) == 2 * 4


def test_blocks_are_those_along_the_diagonal(meter):
    blocked = measured(block=64)[0].statistics()[GATE]
    whole = meter.statistics()[GATE][0]
    assert blocked.shape == (3, 64, 64)
    for number, block in enumerate(blocked):
        at = slice(64 * number, 64 * (number + 1))
        assert torch.allclose(block, whole[at, at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("in_features", "block", "wanted"),
    [(192, None, 192), (192, 64, 64), (192, 130, 64), (192, 191, 64), (192, 1000, 192)]
    + [(256, 10, 128), (172, 64, 172), (11008, 4096, 256), (4096, 1024, 1024)],
)
def test_blocks_divide_the_inputs_and_hold_whole_groups(in_features, block, wanted):
    size = block_columns(in_features, block)
    assert in_features % size == 0 and size % group_size(4, in_features) == 0
    assert size == wanted


# The file


def test_a_file_gives_back_what_was_written(meter, path):
    file = CalibrationFile(path)
    assert file.about == {"model": "tiny-tales", "tokens": "400"}
    assert file.keys == meter.keys and GATE in file and "lm_head.weight" not in file
    for name, key in meter.keys.items():
        wanted, got = meter.statistics()[key], file.statistics(name)
        assert got.shape == wanted.shape and torch.equal(got, got.transpose(1, 2))
        largest = wanted.diagonal(dim1=1, dim2=2).max()
        assert (got - wanted).abs().max() <= largest / 2**15
    sizes = sum(tensor.numel() for tensor in meter.statistics().values())
    assert path.stat().st_size < 1.1 * sizes + 8192
    assert [item.name for item in path.parent.iterdir()] == [path.name]  # nothing left over


def test_a_file_loses_no_quality(meter, path):
    """Codes from the file's moments move outputs as little as those from the exact ones."""
    weights, file = Checkpoint(TINY_TALES), CalibrationFile(path)
    for name, linear in two_layers().linears().items():
        exact = meter.statistics()[meter.keys[name]]
        weight = weights.read(name, (linear.out_features, linear.in_features)).float()
        losses = []
        for moments in (exact, file.statistics(name)):
            codes, scales, zeros = Gptq(moments)(weight, 3, 64)
            steps = codes.float() - zeros.float().repeat_interleave(64, 1)
            off = weight - steps * scales.float().repeat_interleave(64, 1)
            losses.append(float(((off @ exact[0]) * off).sum()))
        assert losses[1] <= 1.01 * losses[0], name


def test_inputs_that_are_always_zero_survive(tmp_path):
    moments = torch.eye(64)[None] * 2
    moments[0, 3, 3] = 0
    write_calibration(tmp_path / "m", {"a": moments}, {"a": "a", "b": "a"}, {})
    assert torch.allclose(CalibrationFile(tmp_path / "m").statistics("b"), moments)


def test_bad_files_are_named(tmp_path, path):
    with pytest.raises(UserError, match="nowhere: no such file"):
        CalibrationFile(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for read in (CalibrationFile, sha256_of):
        with pytest.raises(UserError, match="is not a regular file"):
            read(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a readable safetensors"):
        CalibrationFile(TINY_TALES / "config.json")
    with pytest.raises(UserError, match="not a file of calibration statistics"):
        CalibrationFile(TINY_TALES / "model.safetensors")
    with pytest.raises(UserError, match="no calibration statistics for 'x'.*tiny-tales"):
        CalibrationFile(path).key("x")
    kind = {"kind": "llmpq-moments", "schema_version": "1"}
    for keys, message in (("[", "map weights"), ('{"a": 1}', "map weights"), ('{"a": "b"}', "'b'")):
        save_file({"x": torch.zeros(1)}, tmp_path / "bad", {**kind, "keys": keys})
        with pytest.raises(UserError, match=message):
            CalibrationFile(tmp_path / "bad")
    wrong = {"a.deviation": torch.ones(1, 64), "a.correlation": torch.zeros(1, 9).short()}
    save_file(wrong, tmp_path / "bad", {**kind, "keys": json.dumps({"a": "a"})})
    with pytest.raises(UserError, match="'a.correlation'"):
        CalibrationFile(tmp_path / "bad").statistics("a")
    for odd in (math.nan, math.inf):
        save_file(
            wrong | {"a.deviation": torch.full((1, 64), odd)},
            tmp_path / "bad",
            {**kind, "keys": json.dumps({"a": "a"})},
        )
        with pytest.raises(UserError, match="'a.deviation' has NaN or infinite numbers"):
            CalibrationFile(tmp_path / "bad").statistics("a")


# Loading weights with it


def test_a_stage_is_loaded_with_the_moments_of_each_weight(meter, path):
    stage = two_layers("3", load_roundings(Quantizer(method="gptq", moments=str(path))))
    weights, file = Checkpoint(TINY_TALES), CalibrationFile(path)
    for name, linear in stage.linears().items():
        weight = weights.read(name, (linear.out_features, linear.in_features))
        codes, scales, zeros = Gptq(file.statistics(name))(weight, 3, 64 if 192 % 128 else 128)
        if linear.in_features != 192:
            continue
        steps = codes.float() - zeros.float().repeat_interleave(64, 1)
        wanted = steps * scales.float().repeat_interleave(64, 1)
        assert torch.equal(linear.dequantized_weight(), wanted), name


def test_moments_are_read_once_an_input_and_only_where_used(path):
    read = []

    class Counted(CalibrationFile):
        def statistics(self, name):
            read.append(name)
            return super().statistics(name)

    for precision in ("16", "8"):
        two_layers(precision, GptqRoundings(Counted(path)))
    assert read == []
    two_layers("4", GptqRoundings(Counted(path)))
    assert len(read) == 2 * 4


def test_one_input_at_a_time_is_held_and_none_afterwards(path, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Seen(Gptq):
        def __init__(self, moments):
            super().__init__(moments)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(roundings, "Gptq", Seen)
    kept = GptqRoundings(CalibrationFile(path))
    two_layers("4", kept)
    assert len(most) == 2 * 4 and set(most) == {1} and len(alive) == 0


def test_weights_without_moments_are_named(tmp_path):
    write_calibration(tmp_path / "m", {"a": torch.eye(64)[None]}, {"a": "a"}, {"model": "other"})
    with pytest.raises(
        UserError, match="m: has no calibration statistics for 'model.layers.3.*other"
    ):
        two_layers("4", load_roundings(Quantizer(method="gptq", moments=str(tmp_path / "m"))))


def test_moments_of_another_size_are_named(tmp_path, meter):
    moments = dict.fromkeys(meter.statistics(), torch.eye(64)[None])
    write_calibration(tmp_path / "m", moments, meter.keys, {})
    with pytest.raises(UserError, match="layers.3.self_attn.q_proj.*64 inputs.*has 192"):
        two_layers("4", load_roundings(Quantizer(method="gptq", moments=str(tmp_path / "m"))))


def test_quantizers_give_their_roundings():
    assert load_roundings(Quantizer()).of("x") is quantize
    assert load_roundings(Quantizer(method="mse")).of("x") is quantize_mse
    assert {*BY_METHOD, "gptq"} == set(get_args(Method)), "every name has a rounding"
    assert len(set(BY_METHOD.values())) == len(BY_METHOD), "of its own"


def test_the_file_is_found_beside_the_plan_or_given(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quantizer = Quantizer(method="gptq", moments=path.name, sha256=sha256_of(path))
    load_roundings(quantizer, base=path.parent / "plan.json")
    load_roundings(quantizer, override=path)
    with pytest.raises(UserError, match=r"tiny.moments.*--moments FILE"):
        load_roundings(quantizer, base=tmp_path / "plan.json")
    with pytest.raises(UserError, match="elsewhere: no such file"):
        load_roundings(quantizer, override=tmp_path / "elsewhere")
    with pytest.raises(UserError, match="'rtn' takes no calibration statistics"):
        load_roundings(Quantizer(), override=path)
    other = Quantizer(method="gptq", moments=path.name, sha256="0" * 64)
    for given in ({"override": path}, {"base": path.parent / "plan.json"}):
        with pytest.raises(UserError, match="not the calibration statistics.*--moments FILE"):
            load_roundings(other, **given)
