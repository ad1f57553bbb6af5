"""What a large photo costs: memory beyond the model's own, time by step, and the detector's time per megapixel.

    python benchmarks/photos.py --data photos/ --output benchmarks/results/photos.json   # and into docs/photos.md

The photo is made of the given ones, repeated until it has its size and at least so many faces; what it shows does not
matter for the costs. Memory is the peak of a process of its own, over what the same process held with the model loaded.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import numpy as np
import tyro

from benchmarks.machine import machine
from benchmarks.pages import between_marks

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Photos:
    """Restore one large photo."""

    data: Path
    """Photos with faces."""
    megapixels: float = 50
    """Of the large photo, 3:2."""
    faces: int = 30
    """It has at least."""
    weights: str = "faces_64"
    """Which model."""
    output: Path | None = None
    """JSON file for the results."""

    def __call__(self) -> dict[str, Any]:
        """Measure, in a process of its own."""
        code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from pathlib import PosixPath"
        asked = (str(self.data), self.megapixels, self.faces, self.weights)
        code += f"; from benchmarks.photos import *; print(json.dumps(measure{asked!r}))"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        return {"machine": machine(), **json.loads(done.stdout.splitlines()[-1])}


def measure(data: str, megapixels: float, faces: int, weights: str) -> dict[str, Any]:
    """The figures."""
    import cv2

    from ldbfr.faces import YuNet
    from ldbfr.photos import PhotoRestorer, PhotoSettings, decode_photo
    from ldbfr.pipeline import LDBFRPipeline

    file = large_photo(Path(data), megapixels, faces)
    pipeline = LDBFRPipeline.from_pretrained(weights)
    pipeline(np.zeros((16, pipeline.side, pipeline.side, 3), np.uint8))  # a full batch: its memory is the model's own
    detector = YuNet()
    detector(np.zeros((64, 64, 3), np.uint8))
    held = peak()
    photo, decoding = timed(lambda: decode_photo(file, name="large"))
    size = photo.width * photo.height / 1e6
    cv2.setNumThreads(1)
    found, detecting = timed(lambda: detector(photo.shown))
    cv2.setNumThreads(-1)
    restorer = PhotoRestorer(pipeline, PhotoSettings(sharp_faces="restore"), detector=lambda _: found)
    result, restoring = timed(lambda: restorer(photo))
    written, encoding = timed(lambda: result.photo.encode("jpeg"))
    return {
        "megapixels": round(size, 1),
        "faces restored": result.num_restored,
        "memory beyond the model's, MiB": round(peak() - held),
        "memory with the model, MiB": round(held),
        "seconds to decode": round(decoding, 2),
        "seconds to find the faces, one thread": round(detecting, 2),
        "ms per megapixel, one thread": round(1e3 * detecting / size, 1),
        "seconds to align, restore and put back": round(restoring, 2),
        "seconds to encode": round(encoding, 2),
        "bytes written": len(written),
    }


def peak() -> float:
    """The most that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work: Any) -> tuple[Any, float]:
    """A result, and the seconds that it took."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def large_photo(folder: Path, megapixels: float, faces: int) -> bytes:
    """A JPEG of 3:2, made in a process of its own, so that its memory is not ours."""
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from benchmarks.photos import *"
    code += f"; sys.stdout.buffer.write(composed(Path({str(folder)!r}), {megapixels}, {faces}))"
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout


def composed(folder: Path, megapixels: float, faces: int) -> bytes:
    """The given photos in rows, each enlarged to its place, until there are faces enough."""
    from ldbfr.faces import YuNet
    from ldbfr.images import decode_image, encode_image, resize

    detector = YuNet()
    photos = [decode_image(path.read_bytes(), name=path.name) for path in sorted(folder.iterdir()) if path.is_file()]
    counts = [len(detector(photo)) for photo in photos]
    height = round((megapixels * 1e6 / 1.5) ** 0.5)
    width = round(height * 1.5)
    for rows in range(1, 20):
        side = height // rows
        canvas, total, left, row, number = np.full((height, width, 3), 128, np.uint8), 0, 0, 0, 0
        while row < rows:
            photo = photos[number % len(photos)]
            shown = resize(photo, side, max(1, round(side * photo.shape[1] / photo.shape[0])))
            room = min(shown.shape[1], width - left)
            canvas[row * side : (row + 1) * side, left : left + room] = shown[:, :room]
            total += counts[number % len(photos)] if room == shown.shape[1] else 0
            left, number = left + room, number + 1
            if left >= width:
                left, row = 0, row + 1
        if total >= faces:
            break
    return encode_image(canvas, "jpeg", quality=92)


def main(chosen: Photos) -> None:
    """Measure, print, and write."""
    results = {"command": " ".join(["python", "benchmarks/photos.py", *sys.argv[1:]]), **chosen()}
    print(json.dumps(results, indent=1))
    if chosen.output is not None:
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        page = REPOSITORY / "docs" / "photos.md"
        page.write_text(with_table(page.read_text("utf-8"), results), "utf-8")


def with_table(page: str, results: dict[str, Any]) -> str:
    """The page with the results between its marks."""
    about = f"{results['machine']['cpu']}, {results['machine']['cores']} cores, by `python benchmarks/photos.py`"
    figures = [f"| {name} | {value:,} |\n" for name, value in results.items() if isinstance(value, int | float)]
    table = ["| one large photo | measured |\n", "|---|---|\n", *figures, f"\nMeasured on: {about}.\n"]
    return between_marks(page, "benchmarks/photos.py", "".join(table))


if __name__ == "__main__":
    main(tyro.cli(Photos, description=__doc__))
