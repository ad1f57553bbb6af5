"""Degrade two public-domain portraits, restore them with the main job, and lay everything out side by side.

python jobs/demo.py --output demo-output
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import numpy as np
import tyro

from ldbfr import storage
from ldbfr.archive.naming import FIRST_STAGE_FOLDER
from ldbfr.archive.settings import Weights
from ldbfr.config import DEFAULT_WEIGHTS
from ldbfr.degradations import apply, degradation_generator, draw, get_profile
from ldbfr.errors import InputError, LDBFRError
from ldbfr.faces import TEMPLATES, fit_similarity, warp
from ldbfr.images import Pixels, decode_image, encode_image
from ldbfr.sheets import contact_sheet

SPLITS = ("mild", "medium", "severe")
COLUMNS = ("degraded", "first stage", "restored", "original")

EYES = {name: [((x + 0.5) / 512, (y + 0.5) / 512) for x, y in points[:2]] for name, points in TEMPLATES.items()}
"""Where a template has the two eyes, as shares of the side."""


@dataclass(frozen=True)
class Portrait:
    """A picture that comes inside a package, and where its eyes are.

    `eyes` are the centres of the pupils, (x, y) in px, the one on the picture's left first; measured by hand.
    """

    title: str
    package: str
    distribution: str
    file: str
    eyes: tuple[tuple[float, float], tuple[float, float]]

    @property
    def name(self) -> str:
        """For file names."""
        return self.title.lower().replace(" ", "-")

    def load(self) -> Pixels:
        """The whole picture, (H, W, 3).

        Raises:
            InputError: the package is not installed, or came without the picture.
        """
        found = importlib.util.find_spec(self.package)
        folders = list(found.submodule_search_locations or ()) if found else []
        for folder in folders:
            path = Path(folder, self.file)
            if path.is_file():
                return decode_image(path.read_bytes(), name=str(path))
        raise InputError(
            f"the portrait of {self.title} comes with {self.distribution}, which is not here or lacks {self.file}; "
            "pip install 'ldbfr[demo]'"
        )

    def face(self, template: str, side: int) -> Pixels:
        """The face in a template's framing, (S, S, 3): turned, scaled and cut out in one go."""
        matrix = fit_similarity(np.array(self.eyes), np.array(EYES[template]) * side - 0.5)
        return warp(self.load(), matrix, side, side)


PORTRAITS = (
    Portrait("Eileen Collins", "skimage", "scikit-image", "data/astronaut.png", ((203.0, 100.5), (246.5, 103.5))),
    Portrait(
        "Grace Hopper",
        "matplotlib",
        "matplotlib",
        "mpl-data/sample_data/grace_hopper.jpg",
        ((222.0, 191.0), (305.5, 188.0)),
    ),
)
"""Both are works of the United States government, in the public domain: a NASA and a US Navy portrait."""


@dataclass(frozen=True)
class Demo:
    """Degrade two portraits in three ways, restore them with jobs/restore.py, and show it all in one picture.

    Example:

        python jobs/demo.py --output demo-output
    """

    output: Path = Path("demo-output")
    """Folder for inputs, results and demo.png; made if needed."""
    weights: str = DEFAULT_WEIGHTS
    """Name of weights that come with ldbfr, or a folder of `ldbfr export`."""
    seed: int = 0
    """Of the degradations and of the model's noise."""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; its exit code."""
    request = tyro.cli(Demo, args=arguments, prog="demo.py")
    try:
        weights = Weights.find(request.weights)
        originals = write_inputs(request, weights)
        code = restore(request)
        if code:
            return code
        picture = request.output / "demo.png"
        storage.write_bytes(str(picture), encode_image(lay_out(request, originals), "png"))
    except LDBFRError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    side = weights.preset.side
    print(
        f"\nSee {picture}: {', '.join(COLUMNS)} of {len(originals)} portraits, degraded by {', '.join(SPLITS)} recipes."
    )
    if weights.reference == DEFAULT_WEIGHTS:
        print(f"These weights draw faces of {side} px; their model card says how well, and where they fail.")
    return 0


def file_name(portrait: Portrait, split: str) -> str:
    """Of an input and its results."""
    return f"{portrait.name}-{split}.png"


def write_inputs(request: Demo, weights: Weights) -> dict[str, Pixels]:
    """Write every portrait's face, and one degraded copy per split; the faces by title."""
    faces = {}
    for portrait in PORTRAITS:
        face = portrait.face(weights.preset.template, weights.preset.side)
        faces[portrait.title] = face
        storage.write_bytes(str(request.output / "originals" / f"{portrait.name}.png"), encode_image(face, "png"))
        for split in SPLITS:
            recipe = draw(get_profile(split), degradation_generator(request.seed, portrait.name, split))
            degraded = encode_image(apply(recipe, face), "png")
            storage.write_bytes(str(request.output / "inputs" / file_name(portrait, split)), degraded)
    return faces


def restore(request: Demo) -> int:
    """Run the job as a user does; its exit code."""
    command = [sys.executable, str(Path(__file__).with_name("restore.py")), "--first-stage"]
    command += ["--input", str(request.output / "inputs"), "--output", str(request.output / "restored")]
    command += ["--weights", request.weights, "--seed", str(request.seed)]
    return subprocess.run(command, check=False).returncode


def lay_out(request: Demo, originals: dict[str, Pixels]) -> Pixels:
    """The picture: a row per portrait and split, the faces enlarged twice at least."""
    restored = request.output / "restored"
    folders = (request.output / "inputs", restored / FIRST_STAGE_FOLDER, restored)
    rows, titles, cell = [], [], 0
    for portrait in PORTRAITS:
        original = originals[portrait.title]
        cell = max(192, 2 * len(original))
        for split in SPLITS:
            paths = [folder / file_name(portrait, split) for folder in folders]
            rows.append([decode_image(storage.read_bytes(str(path)), name=str(path)) for path in paths] + [original])
            titles.append(f"{portrait.title}, {split}")
    return contact_sheet(rows, COLUMNS, titles, cell)


if __name__ == "__main__":
    sys.exit(main())
