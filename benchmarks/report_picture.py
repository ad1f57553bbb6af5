"""Draw the README's picture of a report: two public-domain portraits, degraded many times and restored.

    python benchmarks/report_picture.py

Needs Chromium and the extras `demo` and `test`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

from jobs.demo import PORTRAITS, SPLITS
from ldbfr.archive.settings import Weights
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.images import encode_image

REPOSITORY = Path(__file__).resolve().parent.parent
COPIES = 40
WIDTH, HEIGHT = 1200, 1500


def write_inputs(folder: Path) -> None:
    """The degraded copies, and files that an archive has too."""
    weights = Weights.find("faces_64")
    for portrait in PORTRAITS:
        face = portrait.face(weights.preset.template, weights.preset.side)
        for split in SPLITS:
            for copy in range(COPIES):
                recipe = draw(get_profile(split), degradation_generator(copy, portrait.name, split))
                path = folder / split / f"{portrait.name}-{copy:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_image(apply(recipe, face), "png"))
    whole = (folder / SPLITS[0] / f"{PORTRAITS[0].name}-00.png").read_bytes()
    for number in range(4):
        (folder / f"half-{number}.png").write_bytes(whole[: len(whole) // 2])
    for number in range(2):
        (folder / f"empty-{number}.jpg").write_bytes(b"")
    (folder / "index.csv").write_text("name,year\n")


def main() -> None:
    """Restore, and take the picture of the page's beginning."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(prefix="ldbfr-") as scratch:
        source, output = Path(scratch, "portraits"), Path(scratch, "restored")
        write_inputs(source)
        job = [sys.executable, str(REPOSITORY / "jobs" / "restore.py"), "--input", str(source), "--output", str(output)]
        subprocess.run([*job, "--shard-images", "32"], check=True)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(f"file://{output / 'report.html'}")
            page.screenshot(path=str(REPOSITORY / "docs" / "images" / "archive-report.png"), full_page=False)
            browser.close()


if __name__ == "__main__":
    main()
