"""Draw the README's picture of a report: two public-domain portraits, degraded many times and restored.

    python benchmarks/report_picture.py

Needs Chromium and the extras `demo` and `test`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import boto3

from jobs.demo import PORTRAITS, SPLITS
from ldbfr import storage
from ldbfr.archive.settings import Weights
from ldbfr.config import DEFAULT_WEIGHTS
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.images import encode_image
from tests.s3_server import moto_server

REPOSITORY = Path(__file__).resolve().parent.parent
COPIES = 40
WIDTH, HEIGHT = 1200, 1500


def write_inputs(folder: Path) -> None:
    """The degraded copies, and files that an archive has too."""
    weights = Weights.find(DEFAULT_WEIGHTS)
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


@contextmanager
def bucket(name: str) -> Iterator[None]:
    """An S3 server on this machine, with a bucket in it."""
    with moto_server() as endpoint:
        os.environ.update(AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
        yield


def main() -> None:
    """Restore, and take the picture of the page's beginning."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(prefix="ldbfr-") as scratch, bucket("museum"):
        source, output = Path(scratch, "portraits"), "s3://museum/restored"
        write_inputs(source)
        with zipfile.ZipFile(Path(scratch, "portraits.zip"), "w") as archive:
            for path in sorted(source.rglob("*.*")):
                archive.write(path, path.relative_to(source))
        storage.put_file(Path(scratch, "portraits.zip"), "s3://museum/scans/portraits.zip")
        job = [sys.executable, str(REPOSITORY / "jobs" / "restore.py"), "--input", "s3://museum/scans"]
        subprocess.run([*job, "--output", output, "--shard-images", "32"], check=True)
        Path(scratch, "report.html").write_bytes(storage.read_bytes(f"{output}/report.html"))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(f"file://{scratch}/report.html")
            page.screenshot(path=str(REPOSITORY / "docs" / "images" / "archive-report.png"), full_page=False)
            browser.close()


if __name__ == "__main__":
    main()
