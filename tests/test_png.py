"""The PNG writer: any reader reads it back, and its bytes are the same everywhere."""

from __future__ import annotations

import hashlib
import heapq

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldbfr.errors import InputError
from ldbfr.evaluation.png import code_lengths, encode_png
from ldbfr.images import decode_image, encode_image
from tests.tiny import blob_faces

GOLDEN = "a6620257fb6d9b1920b34fe2872ff437f3adc2fd1606e6d74dc0a6db3492cd68"


@pytest.mark.parametrize("shape", [(1, 1, 3), (64, 2, 3), (65, 3, 3), (200, 130, 3)])
@pytest.mark.parametrize("kind", ["noise", "flat", "ramp"])
def test_what_is_written_is_read_back(shape: tuple[int, int, int], kind: str, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, shape, np.uint8)
    if kind == "flat":
        pixels[:] = 7
    if kind == "ramp":
        pixels = np.broadcast_to(np.arange(shape[1], dtype=np.uint8)[None, :, None], shape).copy()
    data = encode_png(pixels)
    assert (decode_image(data, name="png") == pixels).all()
    assert (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] == pixels).all()


def test_files_are_about_as_small_as_other_writers() -> None:
    face = blob_faces(1, 256)[0]
    noisy = np.clip(face + np.random.default_rng(0).normal(0, 3, face.shape), 0, 255).astype(np.uint8)
    assert len(encode_png(noisy)) < 1.1 * len(encode_image(noisy, "png"))


def test_the_bytes_are_those_of_every_machine() -> None:
    # A golden, because this is a promise across machines: integer arithmetic alone, no zlib.
    y, x = np.mgrid[0:150, 0:97]
    pixels = np.stack([x * y % 251, (x ^ y) * 3 % 256, x * x + 5 * y & 255], axis=-1).astype(np.uint8)
    assert hashlib.sha256(encode_png(pixels)).hexdigest() == GOLDEN


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40).filter(lambda counts: sum(map(bool, counts)) > 1))
@settings(max_examples=60, deadline=None)
def test_code_lengths_are_a_complete_prefix_code_as_short_as_huffmans(counts: list[int]) -> None:
    lengths = code_lengths(np.array(counts))
    used = lengths[lengths > 0]
    assert (lengths > 0).tolist() == [count > 0 for count in counts]
    assert used.max() <= 15
    assert np.ldexp(1.0, -used).sum() == 1
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    free = 0
    while len(heap) > 1:  # the cost of Huffman's code is the sum of its merges
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        free += merged
        heapq.heappush(heap, merged)
    own = int((lengths * np.array(counts)).sum())
    assert own >= free
    if max(counts) < 50 * min(count for count in counts if count):  # no code is longer than 15 then
        assert own == free


def test_fibonacci_counts_are_held_to_15_bits() -> None:
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    lengths = code_lengths(np.array(counts))
    assert lengths.max() == 15
    assert np.ldexp(1.0, -lengths).sum() == 1


def test_other_pixels_are_refused() -> None:
    with pytest.raises(InputError, match=r"pixels are float64 \(2, 2, 3\), expected uint8"):
        encode_png(np.zeros((2, 2, 3)))  # type: ignore[arg-type]
