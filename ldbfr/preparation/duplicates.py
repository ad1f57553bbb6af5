"""Near-duplicates: the same picture again, re-encoded, resized, a little blurred or recoloured.

A face's fingerprint is two difference hashes (Krawetz 2013, "Kind of like that",
https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html): the face is reduced to 9 x 8, its
luma 299 R + 587 G + 114 B taken, and a bit says for every pixel whether its right neighbour is brighter, by more than 2
of 255 levels, since the rest comes and goes in a flat background. That makes 64 bits; from 17 x 16, 256. Two faces are
near if at most 3 of the 64 and at most 16 of the 256 bits differ.

The 64 bits alone are too few for aligned faces, whose eyes, noses and mouths are all at the same places: of 8,500
distinct faces (200 px), 882 pairs differ in at most 3 of them. But no pair, of the 36 million, differs in fewer than 28
of the 256. Of 1,000 of these faces, 97 % are found again after they were brightened by 15 %, over 99 % re-encoded as
JPEG 40 or blurred (sigma 2), all of them halved in size; shifted by 2 %, which changes a face's framing, 4 %.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from ldbfr.images import Pixels, resize

COARSE_BITS, FINE_BITS = 3, 16
"""How many of the 64 and of the 256 bits may differ."""
MARGIN = 2_000
"""Of luma, which goes to 255,000."""
FINGERPRINT_BYTES = 40

_LUMA = np.array([299, 587, 114])
_BANDS = 7
_CHUNK = 2**20


def fingerprint(pixels: Pixels) -> bytes:
    """The two hashes of a face (S, S, 3), 8 + 32 bytes."""
    return b"".join(np.packbits(_brighter_to_the_right(pixels, size)).tobytes() for size in (8, 16))


def _brighter_to_the_right(pixels: Pixels, size: int) -> np.ndarray:
    """(size, size) bool."""
    luma = resize(pixels, size, size + 1).astype(np.int64) @ _LUMA  # whole numbers: the same on every machine
    brighter: np.ndarray = luma[:, 1:] - luma[:, :-1] > MARGIN
    return brighter


def near_duplicates(fingerprints: np.ndarray) -> np.ndarray:
    """For every face the one for which it is dropped, or -1: (N, 40) uint8 -> (N,) int64.

    Faces are looked at in their order, and one is dropped if it is near an earlier one that stays. So no two that stay
    are near, and the first of several stays.

    Pairs are found as in Manku, Jain, Das Sarma 2007, "Detecting near-duplicates for web crawling", section 3: with the
    64 bits in 7 bands, two hashes that differ in at most 3 bits agree in 4 whole bands at least. So for each of the 35
    choices of 4 bands the faces are sorted by these, and only those that agree are compared. It takes memory for the
    fingerprints and the pairs found; time grows as N log N, plus the pairs that agree by chance.
    """
    _, first, group = np.unique(np.ascontiguousarray(fingerprints).view("V40"), return_index=True, return_inverse=True)
    order = np.argsort(first)  # equal fingerprints are one, at the place of the first
    firsts, group = first[order], np.argsort(order)[group.reshape(-1)]
    stays = _first_that_stay(len(firsts), near_pairs(fingerprints[firsts]))
    keeper = firsts[np.where(stays < 0, np.arange(len(firsts)), stays)][group]
    return np.where(keeper == np.arange(len(fingerprints)), -1, keeper).astype(np.int64)


def _first_that_stay(count: int, pairs: np.ndarray) -> np.ndarray:
    """For pairs (P, 2) in order of their second member: per item the first near one that stays, or -1 if it stays."""
    dropped_for = np.full(count, -1, dtype=np.int64)
    for early, late in pairs:
        if dropped_for[early] < 0 and dropped_for[late] < 0:
            dropped_for[late] = early
    return dropped_for


def near_pairs(fingerprints: np.ndarray) -> np.ndarray:
    """All near pairs (earlier, later) of distinct fingerprints (N, 40): (P, 2) int64, by the later one."""
    words = np.ascontiguousarray(fingerprints).view(">u8").astype(np.uint64)  # (N, 5): 64 bits, then 4 times 64
    found = [np.empty((0, 2), np.int64)]
    for mask in _masks():
        found += _agreeing_pairs(words, mask)
    pairs = np.unique(np.concatenate(found)[:, ::-1], axis=0)
    return pairs[:, ::-1]


def _masks() -> list[np.uint64]:
    """Every choice of the bands that must agree; a band's bits lie all over the picture, where they differ most."""
    bands = [sum(1 << bit for bit in range(64) if bit * 27 % 64 * _BANDS // 64 == band) for band in range(_BANDS)]
    return [np.uint64(sum(chosen)) for chosen in combinations(bands, _BANDS - COARSE_BITS)]


def _agreeing_pairs(words: np.ndarray, mask: np.uint64) -> list[np.ndarray]:
    """The near pairs among those that agree in the masked bits."""
    masked = words[:, 0] & mask
    order = np.argsort(masked, kind="stable")
    ordered = masked[order]
    places = np.arange(len(order))
    found = []
    step = 1
    while len(places := places[places + step < len(order)]):
        places = places[ordered[places] == ordered[places + step]]  # the others of a run get shorter with every step
        for start in range(0, len(places), _CHUNK):
            part = places[start : start + _CHUNK]
            pairs = np.stack([order[part], order[part + step]], axis=1)  # a stable sort keeps the earlier one first
            found.append(pairs[_near(words, pairs)])
        step += 1
    return found


def _near(words: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Which pairs (P, 2) are near, (P,) bool."""
    one, other = words[pairs[:, 0]], words[pairs[:, 1]]
    near: np.ndarray = np.bitwise_count(one[:, 0] ^ other[:, 0]) <= COARSE_BITS
    near[near] = np.bitwise_count(one[near, 1:] ^ other[near, 1:]).sum(axis=1) <= FINE_BITS
    return near
