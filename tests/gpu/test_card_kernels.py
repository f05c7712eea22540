"""On one NVIDIA card: products and attention are those of the weights and keys that they are given.

Where Triton interprets (TRITON_INTERPRET=1) its kernels run on a CPU too, in float16: products of
bfloat16 are wrong there.
"""

import pytest

torch = pytest.importorskip("torch")

from _kernels_alone import packed_arguments, packed_layer  # noqa: E402
from _kernels_linears import filled, make_ready  # noqa: E402
from _kernels_place import Place  # noqa: E402

pytestmark = pytest.mark.gpu

SHAPES = [(192, 256), (640, 512)]  # out, in
ROWS = (1, 16, 200)
DTYPES = [torch.bfloat16, torch.float16]
PRECISIONS = ("16", "8", "4", "3")
MOST_ERROR = 0.01


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def random(place: Place, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(place.device, place.dtype)


@pytest.fixture(scope="module")
def layers(device):
    """Filled layers by (precision, shape, dtype), with their weights as they hold them.

    All are made ready at once, which compiles their kernels in parallel.
    """
    found = {}
    for dtype in DTYPES:
        place = Place(device, dtype)
        for shape in SHAPES:
            for precision in PRECISIONS:
                layer = filled(place, precision, random(place, *shape))
                found[precision, shape, dtype] = layer, layer.dequantized_weight().double()
    make_ready([layer for layer, _ in found.values()], ROWS, Place(device))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_linears_multiply_by_what_they_hold(layers, device, precision, shape, dtype) -> None:
    layer, held = layers[precision, shape, dtype]
    for rows in ROWS:
        x = random(Place(device, dtype), rows, shape[1])
        assert relative_error(layer(x), x.double() @ held.t()) < MOST_ERROR, rows


@pytest.fixture(params=DTYPES, ids=str)
def triton_place(device, request) -> Place:
    """Where Triton's kernels run, with each data type that they can be tested in."""
    if not pytest.importorskip("llmpq.quant.triton_kernels").available(device):
        pytest.skip("Triton's kernels do not run here")
    if device.type == "cpu" and request.param == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    return Place(device, request.param)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_triton_multiplies_by_packed_weights_and_unpacks_them(triton_place, bits) -> None:
    from llmpq.quant.triton_kernels import dequantize, multiply_few_rows

    place = triton_place
    for shape in SHAPES:
        layer = packed_layer(place, bits, shape)
        held, arguments = layer.dequantized_weight(), packed_arguments(layer)
        assert torch.equal(dequantize(*arguments, bits, shape[1], place.dtype), held)
        for rows in ROWS[:2]:
            x = random(place, rows, shape[1])
            found = multiply_few_rows(x, *arguments, bits)
            assert relative_error(found, x.double() @ held.double().t()) < MOST_ERROR


@pytest.mark.parametrize("heads", [(8, 2), (6, 6)], ids=str)
def test_decode_attention_is_that_of_torch(triton_place, heads) -> None:
    from llmpq.models.triton_attention import decode_attention

    place, (query_heads, key_heads), size = triton_place, heads, 64
    lengths = torch.tensor([1, 300, 77], device=place.device)
    columns = int(lengths.max())
    query = random(place, len(lengths), query_heads, 1, size)
    keys = random(place, len(lengths), key_heads, columns, size)
    values = random(place, len(lengths), key_heads, columns, size).flip(0)
    mask = (torch.arange(columns, device=place.device) < lengths[:, None])[:, None, None, :]
    repeated = (t.double().repeat_interleave(query_heads // key_heads, 1) for t in (keys, values))
    wanted = torch.nn.functional.scaled_dot_product_attention(query.double(), *repeated, mask)
    found = decode_attention(query, keys, values, mask, size**-0.5)
    assert relative_error(found, wanted) < MOST_ERROR
