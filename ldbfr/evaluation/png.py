"""PNG whose bytes follow from the pixels alone.

What zlib writes differs from one version or fork of it to another. Test sets are to have the same bytes on every
machine, so this writer does without it: rows are filtered as PNG has it, and coded with a Huffman code for every 64
rows, without the search for repetitions, of which photos have few (files are a few per cent larger). Everything is
integer arithmetic. Any PNG reader reads it.

Sources: PNG specification, section 9 (filters); RFC 1951, section 3.2 (deflate); Larmore and Hirschberg 1990, "A fast
algorithm for optimal length-limited Huffman codes" (package-merge).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from ldbfr.errors import InputError
from ldbfr.images import Pixels

BAND = 64
"""Rows that share a Huffman code."""

LONGEST_CODE = 15
END = 256
"""Deflate's symbol for the end of a block; below are the literal bytes."""

Integers = NDArray[np.int64]


def encode_png(pixels: Pixels) -> bytes:
    """(H, W, 3) uint8 RGB -> a PNG file; equal pixels give equal bytes on every machine.

    Raises:
        InputError: another type or shape.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise InputError(f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 (H, W, 3); convert them first")
    height, width = pixels.shape[:2]
    rows = filtered(pixels)
    bits = []
    for start in range(0, height, BAND):
        bits.append(block(rows[start : start + BAND].reshape(-1), last=start + BAND >= height))
    packed = np.packbits(np.concatenate(bits), bitorder="little").tobytes()
    data = b"\x78\x01" + packed + struct.pack(">I", zlib.adler32(rows.tobytes()))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def filtered(pixels: Pixels) -> NDArray[np.uint8]:
    """Every row with its filter's number before it, (H, 1 + 3 W): the filter with the least sum of absolute values."""
    height, width = pixels.shape[:2]
    values = pixels.reshape(height, -1).astype(np.int16)
    left, up, corner = np.zeros_like(values), np.zeros_like(values), np.zeros_like(values)
    left[:, 3:], up[1:], corner[1:, 3:] = values[:, :-3], values[:-1], values[:-1, :-3]
    choices = np.stack([values - guess for guess in (left, up, (left + up) >> 1, paeth(left, up, corner))])
    choices = choices.astype(np.uint8)  # modulo 256
    best = np.abs(choices.view(np.int8).astype(np.int16)).sum(axis=2, dtype=np.int64).argmin(axis=0)  # (H,)
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = best + 1  # 0 is no filter
    rows[:, 1:] = choices[best, np.arange(height)]
    return rows


def paeth(left: NDArray[np.int16], up: NDArray[np.int16], corner: NDArray[np.int16]) -> NDArray[np.int16]:
    """Of left, up and corner, in this order, the one nearest to left + up - corner."""
    to_left, to_up = np.abs(up - corner), np.abs(left - corner)
    to_corner = np.abs(left + up - 2 * corner)
    nearest: NDArray[np.int16] = np.where(
        (to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner)
    )
    return nearest


def block(literals: NDArray[np.uint8], last: bool) -> NDArray[np.uint8]:
    """A deflate block with a code of its own, as bits in their order."""
    counts = np.bincount(literals, minlength=END + 1)
    counts[END] = 1
    lengths = code_lengths(counts)
    codes = reversed_codes(lengths)
    # 257 literal codes, 1 distance code, 19 code length codes: the lengths 0 to 15 in 4 bits each, no repetitions
    header = [number_bits(int(last), 1), number_bits(2, 2), number_bits(0, 5), number_bits(0, 5), number_bits(15, 4)]
    header += [number_bits(0 if place < 3 else 4, 3) for place in range(19)]
    header += [number_bits(length, 4)[::-1] for length in (*lengths.tolist(), 0)]
    symbols = np.append(literals.astype(np.int64), END)
    return np.concatenate([*header, coded(codes[symbols], lengths[symbols])])


def number_bits(value: int, count: int) -> NDArray[np.uint8]:
    """The lowest bits of a number, the least significant first."""
    return np.array([value >> place & 1 for place in range(count)], np.uint8)


def coded(codes: Integers, lengths: Integers) -> NDArray[np.uint8]:
    """The bits of codes of these lengths, one after the other, each from its least significant bit on."""
    starts = np.cumsum(lengths) - lengths
    bits = np.empty(int(lengths.sum()), np.uint8)
    for place in range(int(lengths.max())):
        there = lengths > place
        bits[starts[there] + place] = codes[there] >> place & 1
    return bits


def code_lengths(counts: Integers) -> Integers:
    """Lengths, at most 15, of the best prefix code for symbols that come so often; 0 for those that never do.

    At least two symbols must come.
    """
    coins = sorted((int(counts[symbol]), (int(symbol),)) for symbol in np.flatnonzero(counts))
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(LONGEST_CODE):
        merged = sorted([*coins, *packages], key=lambda coin: coin[0])  # stable: symbols before packages
        pairs = zip(merged[::2], merged[1::2], strict=False)
        packages = [(one[0] + other[0], one[1] + other[1]) for one, other in pairs]
    chosen = [symbol for _, symbols in packages[: len(coins) - 1] for symbol in symbols]
    return np.bincount(chosen, minlength=len(counts))


def reversed_codes(lengths: Integers) -> Integers:
    """The canonical codes of RFC 1951, 3.2.2, turned round, since deflate writes codes from their first bit on."""
    codes = np.zeros(len(lengths), np.int64)
    code = 0
    for length in range(1, LONGEST_CODE + 1):
        code <<= 1
        for symbol in np.flatnonzero(lengths == length):
            codes[symbol] = int(f"{code:0{length}b}"[::-1], 2)
            code += 1
    return codes
