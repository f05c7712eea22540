# mypy: allow-untyped-defs
"""The Triton programs of `triton_kernels`: they dequantize weights, or multiply few rows by them.

Only `triton_kernels` imports this module, when a kernel is first launched, because the decorators
need Triton. Names that all programs share:

- A row of a packed weight is cut into *streams*: byte `j` of a row holds the codes of columns
  `j`, `j + stream_bytes`, `j + 2 * stream_bytes` and so on (`packing` says why). FIELDS codes lie
  in a byte, and PLANES bytes, `stream_bytes` apart, share a byte of third bits: 8 bits are one
  stream, 4 bits two, 3 bits eight.
- A *granule* is a run of bytes whose codes share a scale within each stream, so that scales are
  loaded once a granule and not once a weight.

`code - zero` is exact: a code below 2**23 becomes a float by setting it as the last bits of 2**23,
which costs one logical operation where a conversion takes a slow unit.

Triton compiles specialized programs where a number is 1 or a multiple of 16. The number of rows is
excluded from this, as another program might add in another order.
"""

import triton
import triton.language as tl

TWO_23 = tl.constexpr(8388608.0)
TWO_23_BITS = tl.constexpr(0x4B000000)


@triton.jit
def _minus_zeros(codes, zeros):
    """`codes - zeros` in fp32, exactly; int32 codes from 0 to 255, small integers as zeros."""
    return (codes | TWO_23_BITS).to(tl.float32, bitcast=True) - (zeros + TWO_23)


@triton.jit
def _codes(packed, starts, in_row, at, stream_bytes, FIELDS: tl.constexpr, PLANES: tl.constexpr):
    """Codes int32 `[N, FIELDS, PLANES, G, R]` of the bytes at positions `at` `[G, R]` of N rows.

    `starts` int64 `[N]` holds the starts of the rows; `in_row` `[N, G, R]` tells which bytes exist.
    """
    field, plane = tl.arange(0, FIELDS), tl.arange(0, PLANES)
    width: tl.constexpr = 2 if PLANES == 2 else 8 // FIELDS
    places = (plane * stream_bytes)[:, None, None] + at[None, :, :]
    low = tl.load(
        packed + starts[:, None, None, None] + places[None, :, :, :],
        mask=in_row[:, None, :, :],
        other=0,
    ).to(tl.int32)
    # `reshape` keeps bytes in their threads, where `[:, None]` would move them.
    low = low.reshape(low.shape[0], 1, PLANES, at.shape[0], at.shape[1])
    codes = low >> (field * width)[None, :, None, None, None]
    codes = codes & ((1 << width) - 1)
    if PLANES == 2:
        # Loaded once for each plane, so that each thread has the third bits of its bytes.
        places = (2 * stream_bytes + plane * 0)[:, None, None] + at[None, :, :]
        third = tl.load(
            packed + starts[:, None, None, None] + places[None, :, :, :],
            mask=in_row[:, None, :, :],
            other=0,
        ).to(tl.int32)
        third = third.reshape(third.shape[0], 1, PLANES, at.shape[0], at.shape[1])
        bit = field[:, None] * PLANES + plane[None, :]
        codes = codes | (((third >> bit[None, :, :, None, None]) & 1) << 2)
    return codes ^ 128 if FIELDS == 1 else codes


@triton.jit
def _grids(grids, rows, in_matrix, columns, groups, group):
    """fp32 scales or zeros `[N, ...]` of `rows` `[N]` at the groups of `columns` `[F, P, G]`."""
    index = columns // group
    return tl.load(
        grids + rows[:, None, None, None] * groups + index[None, :, :, :],
        mask=in_matrix[:, None, None, None] & (index < groups)[None, :, :, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _tile(
    packed, scales, zeros, rows, in_matrix, first,
    in_features, stream_bytes, row_bytes, groups, group,
    FIELDS: tl.constexpr, PLANES: tl.constexpr, GRANULES: tl.constexpr, GRANULE: tl.constexpr,
):  # fmt: skip
    """The weights of `rows` `[N]` in the bytes from `first` on of each stream.

    Four tensors: `code - zero` fp32 `[N, F, P, G, R]`, its scale fp32 `[N, F, P, G]`, its column
    `[F, P, G, R]`, and whether there is such a column.
    """
    begin = first + tl.arange(0, GRANULES) * GRANULE
    at = begin[:, None] + tl.arange(0, GRANULE)[None, :]
    in_row = in_matrix[:, None, None] & (at < stream_bytes)[None, :, :]
    codes = _codes(packed, rows.to(tl.int64) * row_bytes, in_row, at, stream_bytes, FIELDS, PLANES)
    number = tl.arange(0, FIELDS)[:, None] * PLANES + tl.arange(0, PLANES)[None, :]
    offsets = number * stream_bytes
    columns = offsets[:, :, None] + begin[None, None, :]
    zero = _grids(zeros, rows, in_matrix, columns, groups, group)
    scale = _grids(scales, rows, in_matrix, columns, groups, group)
    if FIELDS == 1:
        zero += 128
    column = offsets[:, :, None, None] + at[None, None, :, :]
    exists = (at < stream_bytes)[None, None, :, :] & (column < in_features)
    return _minus_zeros(codes, zero[:, :, :, :, None]), scale, column, exists


@triton.jit(do_not_specialize=["num_rows"])
def multiply_by_sums(
    x, packed, scales, zeros, partial,
    num_rows, out_features, in_features, stream_bytes, row_bytes, groups, group,
    FIELDS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr, GRANULES: tl.constexpr, GRANULE: tl.constexpr,
):  # fmt: skip
    """Computes some outputs of all rows over one chunk of the inputs, without tensor cores.

    The weights stay in registers while rows are processed one at a time, so that a row's sum is
    computed in the same way whatever the other rows are.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_matrix = rows < out_features
    first = tl.program_id(1) * (GRANULES * GRANULE)
    steps, scale, column, exists = _tile(
        packed, scales, zeros, rows, in_matrix, first,
        in_features, stream_bytes, row_bytes, groups, group, FIELDS, PLANES, GRANULES, GRANULE,
    )  # fmt: skip
    weights = steps * scale[:, :, :, :, None]
    out = partial + tl.program_id(1).to(tl.int64) * num_rows * out_features + rows
    for _ in range(num_rows):
        inputs = tl.load(x + column, mask=exists, other=0.0).to(tl.float32)
        products = weights * inputs[None, :, :, :, :]
        sums = tl.sum(products.reshape(BLOCK_N, FIELDS * PLANES * GRANULES * GRANULE), 1)
        tl.store(out, sums, mask=in_matrix)
        x += in_features
        out += out_features


@triton.jit
def _packed_sums(
    inputs_at, has_row, packed, scales, zeros, outs, in_matrix, first, last,
    in_features, stream_bytes, row_bytes, groups, group,
    FIELDS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 products `[BLOCK_M, BLOCK_N]` of rows at `inputs_at` `[M, 1]` with rows `outs` `[N]`.

    Over the blocks from `first` to `last` of BLOCK_K bytes of each stream. Within one a stream has
    one scale an output, so that the product is one of exact integers, and the scale is applied to
    its fp32 sum.
    """
    starts = outs.to(tl.int64) * row_bytes
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first * PLANES, last * PLANES):
        block, plane = step // PLANES, step % PLANES
        at = block * BLOCK_K + tl.arange(0, BLOCK_K)
        in_stream = at < stream_bytes
        in_row = in_stream[:, None] & in_matrix[None, :]
        places = packed + starts[None, :] + at[:, None]
        low = tl.load(places + plane * stream_bytes, mask=in_row, other=0).to(tl.int32)
        if PLANES == 2:
            third = tl.load(places + 2 * stream_bytes, mask=in_row, other=0).to(tl.int32)
        for field in tl.static_range(FIELDS):
            number = field * PLANES + plane
            if PLANES == 2:
                codes = ((low >> (2 * field)) & 3) | (((third >> number) & 1) << 2)
            elif FIELDS == 2:
                codes = (low >> (4 * field)) & 15
            else:
                codes = low ^ 128
            grid = outs * groups + (number * stream_bytes + block * BLOCK_K) // group
            zero = tl.load(zeros + grid, mask=in_matrix, other=0.0).to(tl.float32)
            scale = tl.load(scales + grid, mask=in_matrix, other=0.0).to(tl.float32)
            if FIELDS == 1:
                zero += 128
            column = number * stream_bytes + at
            wanted = has_row[:, None] & (in_stream & (column < in_features))[None, :]
            inputs = tl.load(inputs_at + column[None, :], mask=wanted, other=0.0)
            steps = _minus_zeros(codes, zero[None, :]).to(inputs.dtype)
            sums += tl.dot(inputs, steps) * scale[None, :]
    return sums


@triton.jit(do_not_specialize=["num_rows"])
def multiply_by_dots(
    x, packed, scales, zeros, partial,
    num_rows, out_features, in_features, stream_bytes, row_bytes, groups, group, blocks,
    FIELDS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes some outputs of BLOCK_M rows over one chunk of the inputs, on tensor cores."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_row, in_matrix = rows < num_rows, outs < out_features
    first = tl.program_id(2) * blocks
    last = tl.minimum(first + blocks, tl.cdiv(stream_bytes, BLOCK_K))
    sums = _packed_sums(
        x + rows[:, None] * in_features, has_row, packed, scales, zeros, outs, in_matrix,
        first, last, in_features, stream_bytes, row_bytes, groups, group,
        FIELDS, PLANES, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    out = partial + (tl.program_id(2).to(tl.int64) * num_rows + rows[:, None]) * out_features
    tl.store(out + outs[None, :], sums, mask=has_row[:, None] & in_matrix[None, :])


@triton.jit
def dequantize(
    packed, scales, zeros, out,
    first_row, num_rows, in_features, stream_bytes, row_bytes, groups, group,
    FIELDS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr, GRANULES: tl.constexpr, GRANULE: tl.constexpr,
):  # fmt: skip
    """Writes `(code - zero) * scale`, rounded once, to `out` `[num_rows, in_features]`."""
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = first_row + places
    in_matrix = places < num_rows
    first = tl.program_id(1) * (GRANULES * GRANULE)
    steps, scale, column, exists = _tile(
        packed, scales, zeros, rows, in_matrix, first,
        in_features, stream_bytes, row_bytes, groups, group, FIELDS, PLANES, GRANULES, GRANULE,
    )  # fmt: skip
    scale = scale.to(out.dtype.element_ty).to(tl.float32)
    weights = (steps * scale[:, :, :, :, None]).to(out.dtype.element_ty)
    tl.store(
        out + (places.to(tl.int64) * in_features)[:, None, None, None, None] + column[None],
        weights,
        mask=in_matrix[:, None, None, None, None] & exists[None],
    )


@triton.jit
def add_chunks(partial, bias, out, chunks, size, out_features, HAS_BIAS: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Sums `partial` `[chunks, size]` in order, adds the bias, and rounds to the dtype of `out`."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    sums = tl.zeros((BLOCK,), tl.float32)
    for _ in range(chunks):
        sums += tl.load(partial + place, mask=inside, other=0.0)
        partial += size
    if HAS_BIAS:
        sums += tl.load(bias + place % out_features, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)
