"""The Triton kernels in Triton's interpreter: prints the relative error of each case as JSON.

A program of its own, as Triton decides when it is imported whether it interprets. In float16, since
products of bfloat16 are wrong in the interpreter. Weights are those of real layers, taken in from
random ones; the reference is in 64 bits.
"""

import json
from collections.abc import Iterator

import torch
import torch.nn.functional as F

MOST_ERROR = 1e-3  # of the norm, in float16
CPU = torch.device("cpu")
SHAPES = [(48, 256), (33, 128)]  # out, in
ROWS = (1, 5, 17)
HEADS = ((8, 2, 64), (4, 4, 32))  # query heads, key heads, their size
LENGTHS = (1, 70, 300)  # of the rows of one call


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the norm."""
    return float((found.double() - exact).norm() / exact.norm())


def products() -> Iterator[tuple[str, float]]:
    """Unpacking, which must give the very bits, and few rows times packed weights."""
    from _kernels_alone import packed_arguments, packed_layer
    from _kernels_place import Place

    from llmpq.quant.triton_kernels import dequantize, multiply_few_rows

    place = Place(CPU, torch.float16)
    for bits in (3, 4, 8):
        for shape in SHAPES:
            layer = packed_layer(place, bits, shape)
            held, arguments = layer.dequantized_weight(), packed_arguments(layer)
            unpacked = dequantize(*arguments, bits, shape[1], place.dtype)
            yield f"unpacking {bits} bits {shape}", float((unpacked != held).any())
            for rows in ROWS:
                x = torch.randn(rows, shape[1]).to(place.dtype)
                error = relative_error(
                    multiply_few_rows(x, *arguments, bits), x.double() @ held.double().t()
                )
                yield f"multiplying {rows} rows, {bits} bits {shape}", error


def attention() -> Iterator[tuple[str, float]]:
    """One query a row over keys of unequal length."""
    from llmpq.models.triton_attention import decode_attention

    for query_heads, key_heads, size in HEADS:
        query, keys, values, mask = decode_inputs(query_heads, key_heads, size)
        exact = F.scaled_dot_product_attention(
            query.double(), keys.double(), values.double(), mask, enable_gqa=True
        )
        found = decode_attention(query, keys, values, mask, size**-0.5)
        yield f"attention {query_heads} / {key_heads} x {size}", relative_error(found, exact)


def decode_inputs(query_heads: int, key_heads: int, size: int) -> tuple[torch.Tensor, ...]:
    """Query `[R, Hq, 1, D]`, keys and values `[R, Hk, T, D]`, mask `[R, 1, 1, T]`."""
    rows, columns = len(LENGTHS), max(LENGTHS)
    query = torch.randn(rows, query_heads, 1, size).half()
    keys, values = torch.randn(2, rows, key_heads, columns, size).half()
    mask = torch.arange(columns) < torch.tensor(LENGTHS)[:, None]
    return query, keys, values, mask[:, None, None, :]


def main() -> None:
    """All cases."""
    torch.manual_seed(0)
    print(json.dumps(dict([*products(), *attention()])))


if __name__ == "__main__":
    main()
