"""Routed experts with linears of their own compute what transformers' stacked experts do."""

import pytest
import torch
import transformers
from torch import nn

from llmpq.errors import UserError
from llmpq.models.experts import PackedExperts, expert_blocks, pack_experts, routers
from llmpq.models.linears import LinearMaker
from llmpq.models.live_tensors import PeakMemory
from llmpq.models.stage_model import LayerRange, StageModel
from llmpq.quant import PlainLinear, QuantizedLinear

CPU, META = torch.device("cpu"), torch.device("meta")
HIDDEN, INNER, EXPERTS, CHOSEN = 16, 24, 5, 2
SIZES = {
    "vocab_size": 31,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": CHOSEN,
    "intermediate_size": INNER,
}
# Prefix of transformers' classes -> its configuration; inner size and hidden size may be equal.
KINDS = {
    "Mixtral": SIZES | {"num_local_experts": EXPERTS},
    "Qwen2Moe": SIZES
    | {
        "num_experts": EXPERTS,
        "moe_intermediate_size": HIDDEN,
        "shared_expert_intermediate_size": 8,
    },
    "GptOss": SIZES | {"num_local_experts": EXPERTS},
    "Llama4": SIZES
    | {
        "num_local_experts": EXPERTS,
        "intermediate_size_mlp": 8,
        "interleave_moe_layer_step": 1,
    },
    "GraniteMoe": SIZES | {"num_local_experts": EXPERTS},
}


def layer_of(kind: str) -> nn.Module:
    """A layer of transformers with random weights."""
    text = "Text" if kind == "Llama4" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**KINDS[kind])
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    return model.model.layers[0].requires_grad_(False)


def blocks_of(layer: nn.Module) -> list[nn.Module]:
    """The feed-forward blocks with experts."""
    paths = [path.rpartition(".")[0] for path, _ in expert_blocks(layer)]
    return [layer.get_submodule(path) for path in paths]


def packed(layer: nn.Module) -> list[str]:
    """Replaces the experts of a layer by loaded linears; returns the linears' names."""
    ((path, stacked),) = list(expert_blocks(layer))
    make, names, weights = LinearMaker(torch.float32, CPU), [], matrices(stacked)

    def loaded(name: str, *sizes) -> PlainLinear | QuantizedLinear:
        linear = make("16", *sizes)
        expert, own = name.removeprefix(f"{path}.").split(".")
        for attribute, tensor in weights[own].items():
            linear.load_weight(attribute, tensor[int(expert)])
        names.append(name)
        return linear

    pack_experts(layer, loaded)
    return names


def matrices(stacked: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Weights `[E, out, in]` and biases `[E, out]` by the name of a linear."""
    held = dict(stacked.named_parameters())
    transposed = getattr(stacked, "is_transposed", True)
    up, down = (
        held[f"{n}_proj"].mT if transposed else held[f"{n}_proj"] for n in ("gate_up", "down")
    )
    stacked_up = {"weight": up} | ({"bias": held["gate_up_proj_bias"]} if len(held) == 4 else {})
    halves = (
        [(0, None, 2), (1, None, 2)]
        if len(held) == 4
        else [(0, up.shape[1] // 2), (up.shape[1] // 2, None)]
    )
    gate, up = ({n: t[:, slice(*half)] for n, t in stacked_up.items()} for half in halves)
    bias = {"bias": held["down_proj_bias"]} if len(held) == 4 else {}
    return {"gate_proj": gate, "up_proj": up, "down_proj": {"weight": down} | bias}


def result(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = block(x)
    first = output[0] if isinstance(output, tuple) else output
    return first.reshape(x.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_experts_compute_what_transformers_does(kind):
    layer = layer_of(kind)
    (block,) = blocks_of(layer)
    x = torch.randn(3, 7, HIDDEN)
    expected = result(block, x)
    names = packed(layer)
    block = layer.get_submodule(names[0].rpartition(".experts.")[0])
    assert len(names) == 3 * EXPERTS
    assert not list(expert_blocks(layer))
    assert any(isinstance(module, PackedExperts) for module in block.modules())
    torch.testing.assert_close(result(block, x), expected, rtol=1e-5, atol=1e-5)


class Unknown(nn.Module):
    """Stacked experts that transformers does not let choose an implementation."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 6))
        self.down_proj = nn.Parameter(torch.zeros(2, 3, 8))


def test_experts_that_run_in_other_ways_are_refused():
    layer = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Unknown()})})
    with pytest.raises(UserError, match="'Unknown' runs experts in a way"):
        pack_experts(layer, LinearMaker(torch.float32, CPU))
    normed = layer_of("Mixtral")
    normed.mlp.experts.has_post_expert_norm = True
    with pytest.raises(UserError, match="'MixtralExperts' normalizes what each expert returns"):
        packed(normed)


def test_llama_4_runs_only_the_experts_that_are_chosen():
    layer = layer_of("Llama4")
    packed(layer)
    block = layer.feed_forward
    rows: list[int] = []
    for expert in block.experts:
        expert.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    block(torch.randn(1, 7, HIDDEN))
    assert sum(rows) == 7 * CHOSEN


def test_a_token_does_not_depend_on_those_beside_it():
    layer = layer_of("Mixtral")
    packed(layer)
    x = torch.randn(1, 9, HIDDEN)
    together = layer.mlp(x)
    for token in range(9):
        torch.testing.assert_close(layer.mlp(x[:, token : token + 1])[0, 0], together[0, token])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Mixtral", set()),  # its router is a module of its own
        ("Qwen2Moe", {"mlp.shared_expert_gate"}),
        ("Llama4", {"feed_forward.router"}),
    ],
)
def test_linears_that_weigh_experts_are_found(kind, expected):
    assert routers(layer_of(kind)) == expected


def stage_of(kind: str, precision: str, device: torch.device = CPU) -> StageModel:
    text = "Text" if kind == "Llama4" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**KINDS[kind])
    return StageModel(config, LayerRange(0, 1, 1), [precision], torch.bfloat16, device)


def test_experts_and_the_rest_of_a_layer_have_precisions_of_their_own():
    stage = stage_of("Qwen2Moe", "8+experts@4")
    bits = {name: getattr(linear, "bits", 16) for name, linear in stage.linears().items()}
    of_experts = {bits[name] for name in bits if ".mlp.experts." in name}
    others = {bits[name] for name in bits if ".mlp.experts." not in name}
    assert (of_experts, others) == ({4}, {8})
    assert f"model.layers.0.mlp.experts.{EXPERTS - 1}.down_proj.weight" in bits
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in bits
    assert not any("gate.weight" in name or "shared_expert_gate" in name for name in bits)


def test_a_function_of_names_gives_precisions_to_experts():
    config = transformers.MixtralConfig(**KINDS["Mixtral"])

    def precision(name: str) -> str:
        return "4" if name == "mlp.experts.3.up_proj" else "16"

    stage = StageModel(config, LayerRange(0, 1, 1), [precision], torch.bfloat16, CPU)
    low = [n for n, linear in stage.linears().items() if isinstance(linear, QuantizedLinear)]
    assert low == ["model.layers.0.mlp.experts.3.up_proj.weight"]


def test_without_values_the_most_memory_of_any_routing_is_counted():
    """On the meta device one expert gets all tokens, which no routing exceeds."""
    layer = layer_of("Mixtral")
    packed(layer)
    experts, tokens = layer.mlp.experts, 64
    scores = torch.rand(tokens, CHOSEN)
    even = torch.stack([torch.arange(tokens) % EXPERTS, (torch.arange(tokens) + 1) % EXPERTS], 1)
    uneven = torch.stack(
        [torch.zeros(tokens, dtype=torch.int64), 1 + even[:, 0] % (EXPERTS - 1)], 1
    )
    peaks = []
    with torch.inference_mode():
        for chosen in (even, uneven):
            with PeakMemory() as watch:
                experts(torch.randn(tokens, HIDDEN), chosen, scores)
            peaks.append(watch.peak)
        experts.to(META)
        with PeakMemory() as watch:
            hidden = torch.empty(tokens, HIDDEN, device=META)
            experts(hidden, uneven.to(META), scores.to(META))
    assert peaks[0] < peaks[1] <= watch.peak
