"""The demo end to end, through the job as its own process, on weights of the tiny preset."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from jobs import demo
from ldbfr.images import decode_image
from tests import tiny


@pytest.mark.parametrize("portrait", demo.PORTRAITS, ids=lambda portrait: portrait.name)
@pytest.mark.parametrize("template", sorted(demo.EYES))
def test_the_eyes_land_where_the_template_has_them(portrait: demo.Portrait, template: str) -> None:
    """Two marks painted onto the pupils of the picture come out at the template's eyes."""
    picture = np.zeros_like(portrait.load())
    for x, y in portrait.eyes:
        picture[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4] = 255

    class Marked(demo.Portrait):
        def load(self) -> np.ndarray:
            return picture

    marked = Marked(portrait.title, portrait.package, portrait.distribution, portrait.file, portrait.eyes)
    luma = marked.face(template, 128).astype(float).mean(axis=2)
    for left, (x, y) in zip((0, 64), demo.EYES[template], strict=True):
        half = luma[:, left : left + 64]
        rows, columns = np.indices(half.shape)
        centre = ((columns * half).sum() / half.sum() + left, (rows * half).sum() / half.sum())
        assert centre == pytest.approx((x * 128, y * 128), abs=1.5)


def test_a_portrait_that_is_not_installed_is_named_with_its_extra() -> None:
    missing = demo.Portrait("Nobody", "no_such_package", "no-such-package", "a.png", ((0, 0), (1, 0)))
    with pytest.raises(demo.InputError, match=r"Nobody comes with no-such-package.*ldbfr\[demo\]"):
        missing.load()


@pytest.mark.ray
def test_the_demo_lays_out_every_portrait_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user runs it: from another folder, with a Ray of its own that leaves nothing in the home folder."""
    weights, output, home = tmp_path / "weights", tmp_path / "out", tmp_path / "home"
    tiny.new_pipeline().save_pretrained(weights)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    assert demo.main(["--output", str(output), "--weights", str(weights)]) == 0
    picture = decode_image((output / "demo.png").read_bytes(), name="demo.png")
    rows, columns = len(demo.PORTRAITS) * len(demo.SPLITS), len(demo.COLUMNS)
    assert picture.shape[0] > rows * 3 * tiny.SIDE
    assert picture.shape[1] > columns * 3 * tiny.SIDE
    assert len(list((output / "restored").glob("*.png"))) == rows
    assert (output / "restored" / "report.html").is_file()
    assert list(home.iterdir()) == []
    assert f"See {output / 'demo.png'}" in capsys.readouterr().out


def test_missing_weights_are_refused_with_the_places_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--output", str(tmp_path), "--weights", "no-such-weights"]) == 2
    assert "no weights 'no-such-weights': looked in" in capsys.readouterr().err
