"""The paper's tables 1 and 2, as published. They were measured on other data, and compare with nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedTable:
    """A table of the paper.

    `columns` name what was measured, `rows` are (method, numbers).
    """

    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]


TABLE_1 = PublishedTable(
    "LD-BFR, table 1: CelebA-Test",
    "3,000 CelebA-HQ faces of 512 px, 1,000 of each split, FFHQ framing; protocols are not stated in the paper.",
    ("PSNR ↑", "SSIM ↑", "LPIPS ↓", "FID ↓"),
    (
        ("DFDNet", (20.1478, 0.5333, 0.6238, 79.6028)),
        ("GPEN", (22.8403, 0.6242, 0.5133, 68.0152)),
        ("GFPGAN", (21.3870, 0.5287, 0.5054, 42.1444)),
        ("VQFR", (20.8036, 0.4693, 0.5142, 67.6516)),
        ("CodeFormer", (22.4254, 0.5934, 0.3964, 52.2357)),
        ("DR2+SPAR", (22.2827, 0.6310, 0.4331, 53.7321)),
        ("LD-BFR", (22.9940, 0.6297, 0.4282, 38.9823)),
    ),
)

TABLE_2 = PublishedTable(
    "LD-BFR, table 2: photos without originals",
    "LFW-Test and WIDER-Test, real photos; FID against a set that is not stated in the paper.",
    ("FID, LFW ↓", "FID, WIDER ↓"),
    (
        ("DFDNet", (62.57, 57.84)),
        ("GPEN", (54.65, 60.19)),
        ("GFPGAN", (49.77, 39.51)),
        ("VQFR", (50.87, 44.14)),
        ("CodeFormer", (51.86, 38.78)),
        ("DR2+SPAR", (45.45, 41.18)),
        ("LD-BFR", (38.74, 36.35)),
    ),
)

TABLES = (TABLE_1, TABLE_2)

WARNING = (
    "Published elsewhere, on other data, at another size, by protocols that the paper does not name. FID is not "
    "comparable across papers (CodeFormer on “CelebA-Test” reads 26.9, 52.2, 53.2 or 62.0), and none of these numbers "
    "may be compared with those above. They are here to be read side by side, not against each other."
)
