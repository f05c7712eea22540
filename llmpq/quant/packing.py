"""Packs codes of 3, 4 or 8 bits into bytes and back, in a few whole-tensor passes.

There are two steps. Codes of at most 4 bits first become *nibbles*: column `j` and column
`j + cols/2` share a byte. 3 bits then save the empty top bit of each nibble: the low two bits of
two nibble bytes share a byte of the first plane, the third bits of four of them share a byte of the
second. Both steps pair distant halves of a row, not neighbours, so that every pass reads and writes
long contiguous runs. The second step works for any order of the nibbles, so that kernels with a
layout of their own (`kernels.tile_nibbles`) can store 3 bits too.

Columns are padded with zero codes to a multiple of 8, so a row takes `bits * ceil(cols / 8)` bytes.

Checkpoints of other tools and the kernels of humming use *words* instead (`pack_words`): the bits
of all codes of a row one after the other, lowest first, in int32, where a code may cross two words.
"""

import torch
from torch import Tensor

LOW_TWO_BITS = 0x33  # the mask for both nibbles of a byte
THIRD_BIT = 0x44
CODES_IN_WORDS = 32  # codes that fill whole words at any number of bits


def padded_columns(cols: int) -> int:
    """`cols` rounded up to a multiple of 8."""
    return -(-cols // 8) * 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes `[rows, cols]` into bytes `[rows, bits * ceil(cols / 8)]`."""
    codes = pad_columns(codes)
    return codes if bits == 8 else squeeze_nibbles(pack_nibbles(codes), bits)


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The uint8 codes `[rows, cols]` that `pack` was given."""
    codes = packed if bits == 8 else unpack_nibbles(expand_nibbles(packed, bits))
    return codes[:, :cols]


def pad_columns(codes: Tensor) -> Tensor:
    """Appends zero codes up to a multiple of 8 columns."""
    missing = padded_columns(codes.shape[1]) - codes.shape[1]
    return torch.nn.functional.pad(codes, (0, missing)) if missing else codes


def pack_nibbles(codes: Tensor) -> Tensor:
    """Packs codes below 16, `[..., n]` with `n` even, into bytes `[..., n / 2]`."""
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def unpack_nibbles(nibbles: Tensor) -> Tensor:
    """The codes that `pack_nibbles` was given."""
    return torch.cat((nibbles & 15, nibbles >> 4), dim=-1)


def squeeze_nibbles(nibbles: Tensor, bits: int) -> Tensor:
    """Packs nibble bytes `[rows, n]`, `n` a multiple of 4, into `[rows, n * bits / 4]`."""
    if bits == 4:
        return nibbles
    first, second = (nibbles & LOW_TWO_BITS).chunk(2, dim=-1)
    a, b, c, d = ((nibbles & THIRD_BIT) >> 2).chunk(4, dim=-1)
    return torch.cat((first | (second << 2), a | (b << 1) | (c << 2) | (d << 3)), dim=-1)


def expand_nibbles(packed: Tensor, bits: int) -> Tensor:
    """The nibble bytes that `squeeze_nibbles` was given; eight bytes at a time where rows allow."""
    if bits == 4:
        return packed
    quarter = packed.shape[-1] // 3
    nibbles = packed.new_empty(*packed.shape[:-1], 4 * quarter)
    word, ones = (torch.int64, 0x0101010101010101) if quarter % 8 == 0 else (torch.uint8, 1)
    low_plane, third_plane = packed[..., : 2 * quarter], packed[..., 2 * quarter :]
    first, second = nibbles.view(word).chunk(2, dim=-1)
    torch.bitwise_and(low_plane.view(word), LOW_TWO_BITS * ones, out=first)
    torch.bitwise_right_shift(low_plane.view(word), 2, out=second).bitwise_and_(LOW_TWO_BITS * ones)
    thirds = third_plane.view(word)
    a, b, c, d = nibbles.view(word).chunk(4, dim=-1)
    for part, moved in ((a, thirds << 2), (b, thirds << 1), (c, thirds), (d, thirds >> 1)):
        part |= moved & (THIRD_BIT * ones)
    return nibbles


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes `[rows, cols]` into int32 words `[rows, bits * ceil(cols / 32)]`."""
    missing = -codes.shape[1] % CODES_IN_WORDS
    stream = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
    if bits == 4:
        stream = stream[:, ::2] | (stream[:, 1::2] << 4)
    elif bits == 3:
        stream = _pack_threes(stream)
    return stream.flatten().view(torch.int32).view(len(codes), -1)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes uint8 `[rows, count]` in int32 words `[rows, at least bits * count / 32]`."""
    stream = words.contiguous().view(torch.uint8)
    if bits == 4:
        stream = torch.stack((stream & 15, stream >> 4), dim=-1).flatten(1)
    elif bits == 3:
        stream = _unpack_threes(torch.nn.functional.pad(stream, (0, -stream.shape[1] % 3)))
    return stream[:, :count].contiguous()


def _pack_threes(codes: Tensor) -> Tensor:
    """Packs every eight codes of 3 bits into three bytes; codes cross bytes."""
    a, b, c, d, e, f, g, h = codes.unflatten(1, (-1, 8)).unbind(-1)
    first, second = a | (b << 3) | (c << 6), (c >> 2) | (d << 1) | (e << 4) | (f << 7)
    return torch.stack((first, second, (f >> 1) | (g << 2) | (h << 5)), dim=-1).flatten(1)


def _unpack_threes(stream: Tensor) -> Tensor:
    """The eight codes of 3 bits in every three bytes."""
    first, second, third = stream.unflatten(1, (-1, 3)).unbind(-1)
    crossing = (first >> 6) | ((second & 1) << 2), (second >> 7) | ((third & 3) << 1)
    codes = (
        *(first & 7, (first >> 3) & 7, crossing[0], (second >> 1) & 7),
        *((second >> 4) & 7, crossing[1], (third >> 2) & 7, third >> 5),
    )
    return torch.stack(codes, dim=-1).flatten(1)
