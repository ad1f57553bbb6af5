"""Metrics of single images against the reference libraries on the same pixels, and measured in several processes."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldbfr.errors import ConfigError, InputError, WeightsError
from ldbfr.evaluation import portraits
from ldbfr.evaluation.backbones import LPIPS_FILES, find_backbone, load_tensors
from ldbfr.evaluation.measuring import AHEAD, Pair, in_processes, measure
from ldbfr.evaluation.metric_choice import DEFAULT_METRICS, MetricOptions, make_metrics, metric_names
from ldbfr.evaluation.metrics import IdentityModel, ssim
from ldbfr.evaluation.pair_metrics import LPIPS, PSNR, SSIM, Blur, Identity, Landmarks, SharpnessRatio, load_lpips
from ldbfr.evaluation.portraits import portray
from ldbfr.evaluation.results import Measure, PairMetric
from ldbfr.evaluation.ssim import windowed_ssim
from ldbfr.images import Pixels
from ldbfr.weights import sha256_of
from tests.tiny import blob_faces

needs_dlib = pytest.mark.skipif(not IdentityModel.is_installed(), reason="the extra `identity` is not installed")


def noisy(image: Pixels, level: float, seed: int = 0) -> Pixels:
    """An image with Gaussian noise."""
    noise = np.random.default_rng(seed).normal(0, level, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


FACE = blob_faces(1, 96)[0]
NOISY = noisy(FACE, 12)


# ---- plumbing against the reference libraries ----


@given(st.integers(0, 10**6), st.integers(11, 60), st.integers(11, 60), st.sampled_from([0.0, 3.0, 80.0]))
@settings(max_examples=40, deadline=None)
def test_ssim_is_scikit_images(seed: int, height: int, width: int, level: float) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    other = noisy(image, level, seed + 1)
    assert windowed_ssim(other, image) == pytest.approx(ssim(other, image), abs=1e-9)


def test_ssim_has_its_law() -> None:
    assert windowed_ssim(FACE, FACE) == pytest.approx(1, abs=1e-12)
    assert windowed_ssim(FACE, NOISY) == windowed_ssim(NOISY, FACE) < 1
    # Of two images of one colour each only the means differ: (2xy + c1) / (x² + y² + c1)
    flat = [np.full((20, 20, 3), value, np.uint8) for value in (100, 150)]
    c1 = (0.01 * 255) ** 2
    assert windowed_ssim(*flat) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    with pytest.raises(InputError, match="SSIM needs sides of at least 11 px"):
        windowed_ssim(FACE[:10], FACE[:10])


def test_psnr_is_scikit_images_and_the_formulas() -> None:
    from skimage.metrics import peak_signal_noise_ratio

    assert PSNR()(NOISY, FACE) == pytest.approx(peak_signal_noise_ratio(FACE, NOISY, data_range=255))
    half = FACE // 2
    assert PSNR()(half + 10, half) == pytest.approx(20 * np.log10(255 / 10))
    assert PSNR()(FACE, FACE) == np.inf


def backbone(net: str) -> torch.nn.Sequential:
    """torchvision's features of a network, with random weights."""
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if net == "vgg":  # without its classifier of 124 M numbers
            return models.vgg.make_layers(models.vgg.cfgs["D"])
        return getattr(models, {"alex": "alexnet", "squeeze": "squeezenet1_1"}[net])(weights=None).features


def backbone_file(net: str, folder: Path) -> Path:
    """As torchvision publishes it."""
    path = folder / f"{net}.pth"
    torch.save({f"features.{name}": value for name, value in backbone(net).state_dict().items()}, path)
    return path


@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_lpips_is_the_packages_on_the_same_pixels(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lpips
    from lpips import pretrained_networks

    name = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}[net]
    downloaded = SimpleNamespace(features=backbone(net))  # in the place of what torchvision would download
    monkeypatch.setattr(pretrained_networks, "tv", SimpleNamespace(**{name: lambda pretrained: downloaded}))
    theirs = lpips.LPIPS(net=net, verbose=False)
    monkeypatch.undo()
    x, y = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1 for image in (NOISY, FACE))
    metric = LPIPS(net, backbone_file(net, tmp_path))  # type: ignore[arg-type]
    assert metric(NOISY, FACE) == pytest.approx(theirs(x, y).item(), rel=1e-5)
    assert metric(FACE, FACE) == 0
    assert metric.measure.name == f"lpips-{net}"
    assert f"{net} backbone (weights" in metric.measure.protocol
    load_lpips.cache_clear()


def test_lpips_takes_its_own_backbone_only(tmp_path: Path) -> None:
    path = backbone_file("squeeze", tmp_path)
    with pytest.raises(WeightsError, match=r"lacks features\..*it is not the alex network; supply alexnet-owt"):
        LPIPS("alex", path)(FACE, FACE)
    path.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"is no readable file of weights .*; copy it again"):
        LPIPS("squeeze", path)(FACE, FACE)


def test_a_garbled_file_is_said_to_be_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "garbled.pth"
    for length in rng.integers(0, 400, 200):
        path.write_bytes(rng.bytes(length))
        with pytest.raises(WeightsError, match=r"garbled.pth (is no readable file of weights|holds \w+, expected)"):
            load_tensors(path)


# ---- on another machine ----


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache of a machine that has no weights and downloads none."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("LDBFR_OFFLINE", "1")
    monkeypatch.setenv("LDBFR_CACHE", str(cache))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield cache
    load_lpips.cache_clear()


def sent(metric: LPIPS) -> LPIPS:
    """A metric as a process of another machine gets it."""
    load_lpips.cache_clear()
    again: LPIPS = pickle.loads(pickle.dumps(metric))
    return again


def test_another_machine_finds_its_own_copy_of_what_somebody_gave(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = backbone_file("squeeze", tmp_path)
    monkeypatch.chdir(tmp_path)
    metric = LPIPS("squeeze", path.name)
    expected, digest = metric(NOISY, FACE), sha256_of(path)
    (tmp_path / "other directory").mkdir()
    monkeypatch.chdir(tmp_path / "other directory")
    assert sent(metric)(NOISY, FACE) == expected  # a relative path is that of the working directory at the start
    copy = path.rename(tmp_path / "copy.pth")
    machine = re.escape(platform.node())
    with pytest.raises(
        WeightsError,
        match=rf"{machine} lacks the weights .*{digest}.* copy them there to {path}, or .*LDBFR_SQUEEZENET",
    ):
        sent(metric)(NOISY, FACE)
    monkeypatch.setenv("LDBFR_SQUEEZENET", str(copy))
    assert sent(metric)(NOISY, FACE) == expected
    copy.write_bytes(b"another")
    with pytest.raises(
        WeightsError, match=rf"{machine}: {copy} .* is another file .*SHA-256 {digest}\); copy that one"
    ):
        sent(metric)(NOISY, FACE)


def test_another_machine_finds_the_published_file_wherever_it_has_it(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = backbone_file("squeeze", tmp_path)
    file = LPIPS_FILES["squeeze"]
    published = dataclasses.replace(file, size=path.stat().st_size, sha256=sha256_of(path))
    monkeypatch.setitem(LPIPS_FILES, "squeeze", published)
    metric = LPIPS("squeeze", path)
    assert load_lpips.cache_info().currsize == 0  # its digest says enough
    expected = metric(NOISY, FACE)
    path.rename(elsewhere / file.name)
    assert sent(metric)(NOISY, FACE) == expected
    (elsewhere / file.name).unlink()
    with pytest.raises(WeightsError, match=rf"{re.escape(platform.node())}: .* supply {file.name} .* into {elsewhere}"):
        sent(metric)(NOISY, FACE)


def test_torchs_own_cache_is_looked_at_before_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDBFR_OFFLINE", "1")
    monkeypatch.setenv("LDBFR_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = LPIPS_FILES["squeeze"]
    with pytest.raises(WeightsError, match=r"forbids downloads; supply squeezenet1_1-b8a52dc0.pth \(4,958,839 bytes"):
        find_backbone(file)
    data = b"weights"
    small = dataclasses.replace(file, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    there = tmp_path / "torch" / "hub" / "checkpoints" / file.name
    there.parent.mkdir(parents=True)
    there.write_bytes(data)
    assert find_backbone(small) == there
    there.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="forbids downloads"):
        find_backbone(small)


# ---- laws ----


@needs_dlib
def test_equal_faces_have_no_distances_and_noisy_ones_have() -> None:
    for metric in (Identity("tight"), Landmarks("tight"), Identity("ffhq"), Landmarks("ffhq")):
        assert metric(FACE, FACE) == 0
        assert metric(noisy(FACE, 60), FACE) > 0


@needs_dlib
def test_portraits_are_remembered_by_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    first = portray(FACE)
    monkeypatch.setattr(IdentityModel, "embed", None)  # would fail if it were asked again
    assert portray(FACE.copy()) is first
    with pytest.raises(TypeError):
        portray(NOISY)


def test_sharpness_is_a_ratio() -> None:
    ratio = SharpnessRatio()
    assert ratio(FACE, FACE) == 1
    assert ratio(NOISY, FACE) == pytest.approx(1 / ratio(FACE, NOISY))
    with pytest.raises(InputError, match="the original is of one colour"):
        ratio(FACE, np.zeros_like(FACE))


def test_blur_grows_with_blur_and_is_scikit_images() -> None:
    import cv2
    from skimage.measure import blur_effect

    blur = Blur()
    sharp = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    values = [blur(np.asarray(cv2.GaussianBlur(sharp, (0, 0), sigma)), None) for sigma in (0.5, 1, 2, 4)]
    assert 0 < values[0] < values[1] < values[2] < values[3] < 1
    assert blur(FACE, None) == pytest.approx(blur_effect(FACE, channel_axis=-1))
    with pytest.raises(InputError, match="it is of one colour"):
        blur(np.zeros_like(FACE), None)


# ---- which there are ----


def test_what_cannot_be_had_is_missing_and_says_what_to_supply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDBFR_OFFLINE", "1")
    monkeypatch.setenv("LDBFR_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    pairs, sets, missing = make_metrics([*DEFAULT_METRICS, "pyiqa:niqe"])
    reasons = {one.name: one.reason for one in missing}
    assert "supply alexnet-owt-7be5be79.pth (244,408,911 bytes" in reasons["lpips-alex"]
    assert "supply weights-inception-2015-12-05-6726825d.pth" in reasons["fid"]
    assert "pip install 'ldbfr[iqa]'" in reasons["pyiqa:niqe"] or "forbids the download" in reasons["pyiqa:niqe"]
    names = [metric.measure.name for metric in (*pairs, *sets)]
    assert {*names, *reasons} == {*DEFAULT_METRICS, "pyiqa:niqe"}
    assert {"psnr", "ssim", "sharpness", "blur"} <= {*names}


@pytest.mark.parametrize("way", ["option", "environment"])
def test_weights_that_will_not_do_are_missing_before_anything_is_measured(
    way: str, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, other = tmp_path / "damaged.pth", backbone_file("squeeze", tmp_path)
    damaged.write_bytes(b"nothing")
    given = {"alexnet": str(other), "squeezenet": str(damaged), "vgg16": "/proc/self/mem"}  # which nobody can read
    if way == "environment":
        for name, path in given.items():
            monkeypatch.setenv(f"LDBFR_{name.upper()}", path)
        given = {}
    names = ["psnr", "lpips-alex", "lpips-squeeze", "lpips-vgg", "sharpness"]
    pairs, _, missing = make_metrics(names, MetricOptions(**given))  # type: ignore[arg-type]
    assert [metric.measure.name for metric in pairs] == ["psnr", "sharpness"]
    reasons = {one.name: one.reason for one in missing}
    assert f"{other} lacks features." in reasons["lpips-alex"]
    assert "supply alexnet-owt-7be5be79.pth" in reasons["lpips-alex"]
    assert f"{damaged} is no readable file of weights" in reasons["lpips-squeeze"]
    assert "/proc/self/mem cannot be read" in reasons["lpips-vgg"]


@pytest.mark.parametrize(
    "code",
    [
        "import nothing_of_that_name",
        "list_models = lambda: ['niqe']\ndef create_metric(*_, **__): import nothing_of_that_name",
    ],
)
def test_a_pyiqa_that_lacks_something_is_missing(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDBFR_OFFLINE", raising=False)
    (tmp_path / "pyiqa.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    pairs, _, missing = make_metrics(["pyiqa:niqe", "psnr"])
    sys.modules.pop("pyiqa", None)
    assert [metric.measure.name for metric in pairs] == ["psnr"]
    assert "cannot be imported (No module named 'nothing_of_that_name'); install what it names" in missing[0].reason


@needs_dlib
def test_a_dlib_built_from_source_says_its_own_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import dlib

    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(portraits, "version", none)
    for metric in (Identity("tight"), Landmarks("tight")):
        assert f"dlib {dlib.__version__}, " in metric.measure.protocol


def test_pyiqas_metrics_are_its_own_and_download_nothing_where_that_is_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyiqa", reason="the extra `iqa` is not installed")
    monkeypatch.setenv("LDBFR_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    pairs, _, missing = make_metrics(["pyiqa:psnr", "pyiqa:niqe", "pyiqa:nothing"])
    assert pairs[0](NOISY, FACE) == pytest.approx(PSNR()(NOISY, FACE), abs=1e-3)
    assert pairs[0].measure.better == "higher"
    assert "$LDBFR_OFFLINE forbids the download of" in missing[0].reason
    assert "pyiqa has no metric 'nothing'" in missing[1].reason


def test_names_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"there is no metric 'fdi'; expected psnr, ssim, .*or pyiqa:NAME"):
        make_metrics(["fdi"])
    with pytest.raises(ConfigError, match="the metric psnr is named twice"):
        make_metrics(["psnr", "psnr"])
    with pytest.raises(ConfigError, match="compare with another set: give its folder"):
        make_metrics(["fid-reference"])
    assert len(metric_names()) == len(set(metric_names()))


@needs_dlib
def test_metrics_travel_to_other_processes() -> None:
    pairs, sets, _ = make_metrics(["psnr", "ssim", "identity", "landmarks", "sharpness", "blur", "frechet-dlib"])
    for metric in pairs:
        again = pickle.loads(pickle.dumps(metric))
        assert again.measure == metric.measure
        assert again(NOISY, FACE) == metric(NOISY, FACE)
    assert pickle.loads(pickle.dumps(sets[0])).measure == sets[0].measure
    assert MetricOptions().framing == "tight"


# ---- measuring ----


class Dark:
    """Not a number for a black image."""

    needs_original = False
    measure = Measure(name="dark", label="dark", better="higher", protocol="dark")

    def __call__(self, image: Pixels, original: Pixels | None) -> float:
        return float(image.mean()) or float("nan")


def pairs_of(count: int) -> Iterator[Pair]:
    """Faces with noisy copies; each second one has no original."""
    for number, face in enumerate(blob_faces(count, 24)):
        yield f"face {number}", noisy(face, 9, number), face if number % 2 else None


@pytest.mark.parametrize("processes", [1, 2])
def test_pairs_are_measured_in_order_in_any_number_of_processes(processes: int) -> None:
    metrics: list[PairMetric] = [PSNR(), Blur()]
    measured = list(measure(metrics, pairs_of(9), processes))
    assert [key for key, _ in measured] == [f"face {number}" for number in range(9)]
    for (_, image, original), (_, numbers) in zip(pairs_of(9), measured, strict=True):
        assert numbers["blur"] == Blur()(image, original)
        assert numbers.get("psnr") == (None if original is None else PSNR()(image, original))


def test_few_pairs_are_in_flight() -> None:
    taken = 0

    def count() -> Iterator[Pair]:
        nonlocal taken
        for pair in pairs_of(40):
            taken += 1
            yield pair

    measured = measure([PSNR()], count(), 2)
    assert taken == 0
    for done in range(1, 11):
        next(measured)
        assert taken <= done + 2 * AHEAD
    measured.close()
    assert taken < 40


def test_errors_name_the_image() -> None:
    with pytest.raises(InputError, match=r"a: the image is 96 × 90 px, its original 96 × 96 px; give images of"):
        list(measure([PSNR()], [("a", FACE[:90], FACE)], 1))
    with pytest.raises(InputError, match="b: dark is not a number; look at the image"):
        list(measure([Dark()], [("b", np.zeros_like(FACE), None)], 1))
    with pytest.raises(InputError, match=r"c: ssim cannot be measured: images of shape .* at least 11 px"):
        list(measure([SSIM()], [("c", FACE[:5], FACE[:5])], 2))
    with pytest.raises(ConfigError, match="0 processes: expected at least 1"):
        list(in_processes(len, ["a"], 0))
