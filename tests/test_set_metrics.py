"""Distances of sets: closed forms, the reference library's arithmetic, streams, too few images, statistics files."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ldbfr.errors import ConfigError, InputError, WeightsError
from ldbfr.evaluation import metric_choice
from ldbfr.evaluation.engine import Evaluation, Metrics, on_this_machine
from ldbfr.evaluation.features import DlibFeatures, InceptionFeatures, load_inception
from ldbfr.evaluation.frechet import frechet_distance
from ldbfr.evaluation.metric_choice import MetricOptions, make_metrics, reference_statistics
from ldbfr.evaluation.metrics import IdentityModel
from ldbfr.evaluation.moments import Moments
from ldbfr.evaluation.restorers import InputItself
from ldbfr.evaluation.results import Score, SetMetric
from ldbfr.evaluation.set_metrics import FrechetMetric, KernelMetric, Reservoir
from ldbfr.evaluation.statistics import Statistics, read_statistics, write_statistics
from ldbfr.evaluation.work import SetStep, measures_key
from ldbfr.images import Pixels, encode_image
from tests.evaluating import BlobSet
from tests.tiny import blob_faces

needs_fidelity = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("torch_fidelity"), reason="torch-fidelity is not installed"
)


class Corners:
    """A feature network that a test can follow: the first pixels' values; NaN for a black image."""

    name, digest, size, about = "corners-6", "0" * 64, 6, "the first two pixels"

    def features(self, image: Pixels) -> NDArray[np.float64]:
        if not image.any():
            return np.full(self.size, np.nan)
        return image.reshape(-1)[: self.size].astype(np.float64)


def images(count: int, seed: int = 0, low: int = 1, high: int = 256) -> Pixels:
    """Images of noise, (count, 4, 4, 3)."""
    return np.random.default_rng(seed).integers(low, high, (count, 4, 4, 3), np.uint8)


def features(pixels: Pixels) -> NDArray[np.float64]:
    """What `Corners` makes of all."""
    return np.stack([Corners().features(image) for image in pixels])


def filled(metric: Any, own: Pixels, originals: Pixels | None = None) -> Any:
    """A metric that has seen these images."""
    for number, image in enumerate(own):
        metric.update(image, None if originals is None else originals[number], f"image {number}")
    return metric


# ---- moments ----


@given(st.lists(st.integers(0, 150), min_size=1, max_size=5), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_moments_merged_of_any_parts_are_those_of_the_whole(parts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(sum(parts) + 2, 4)) @ rng.normal(size=(4, 4)) + 1e4  # a mean far from 0
    whole = Moments(4)
    start = 0
    for count in [*parts, 2]:
        part = Moments(4)
        for vector in values[start : start + count]:
            part.add(vector)
        whole.merge(part)
        start += count
    assert whole.count == len(values)
    np.testing.assert_allclose(whole.mean, values.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(whole.covariance(), np.cov(values, rowvar=False), rtol=1e-7, atol=1e-9)


def test_moments_refuse_what_has_none() -> None:
    moments = Moments(3)
    with pytest.raises(InputError, match="a covariance needs at least 2"):
        moments.covariance()
    with pytest.raises(InputError, match=r"features of shape \(2,\), expected \(3,\)"):
        moments.add(np.zeros(2))
    with pytest.raises(InputError, match="not finite"):
        moments.add(np.array([0, np.inf, 0]))
    with pytest.raises(InputError, match="expected one length"):
        moments.merge(Moments(2))


# ---- Fréchet ----


def test_the_stream_is_the_batch_and_torch_fidelitys_number() -> None:
    own, originals = images(300), images(300, 1, 40, 200)
    metric = filled(FrechetMetric(Corners()), own, originals)
    assert metric.value() == pytest.approx(frechet_distance(features(own), features(originals)), rel=1e-9)
    fidelity = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity is not installed")
    theirs = fidelity.fid_statistics_to_metric(
        *(fidelity.fid_features_to_statistics(torch.from_numpy(features(each))) for each in (own, originals)), False
    )
    assert metric.value() == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert metric.remark == ""


def test_of_gaussians_that_share_their_axes_it_has_the_closed_form() -> None:
    mean, spread = np.arange(6.0), np.array([1.0, 2, 3, 4, 5, 6])
    own = images(5_000)
    reference = Statistics(mean, np.diag(spread**2), 10**6, "a Gaussian")
    metric = filled(FrechetMetric(Corners(), reference=reference), own)
    values = features(own)
    # The pixels' features are independent but for chance; with the covariance's diagonal alone the form is exact.
    metric.own = Moments(6)
    for vector in (values - values.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(values.T))).T * 7 + 100:
        metric.own.add(vector)
    assert metric.value() == pytest.approx(((100 - mean) ** 2).sum() + ((7 - spread) ** 2).sum())


def test_too_few_images_are_refused_unless_forced_and_then_marked() -> None:
    own = images(5)
    with pytest.raises(InputError, match=r"5 images, fewer than the 6 features: .*Take more images, or force it"):
        filled(FrechetMetric(Corners()), own, own).value()
    forced = filled(FrechetMetric(Corners(), force=True), own, own)
    assert forced.value() == pytest.approx(0, abs=0.01)  # of variances of 5,000
    assert forced.remark == "forced: 5 images, fewer than the 6 features"
    assert filled(FrechetMetric(Corners(), force=True), images(6), images(6)).remark == ""
    few = Statistics(np.zeros(6), np.eye(6), 3, "a few")
    with pytest.raises(InputError, match="3 images of the reference, fewer than the 6 features"):
        filled(FrechetMetric(Corners(), reference=few), images(9)).value()
    with pytest.raises(InputError, match="fewer than the 6 features"):
        filled(FrechetMetric(Corners(), force=True), own[:1], own[:1]).value()


def test_an_image_without_features_is_named() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    metric = FrechetMetric(Corners())
    with pytest.raises(InputError, match="mild/7: its features by corners-6 hold numbers that are not finite"):
        metric.update(black, images(1)[0], "mild/7")
    with pytest.raises(InputError, match="mild/7, the original: its features"):
        metric.update(images(1)[0], black, "mild/7")


def test_a_set_without_originals_needs_a_reference() -> None:
    for metric in (FrechetMetric(Corners()), KernelMetric(Corners())):
        with pytest.raises(InputError, match="9 of 9 images have no original: give a reference folder"):
            filled(metric, images(9)).value()


def test_fresh_is_empty_and_shares_network_and_reference() -> None:
    reference = Statistics(np.zeros(6), np.eye(6), 9, "some")
    metric = filled(FrechetMetric(Corners(), "fid-reference", "FID (reference)", reference, True), images(3))
    fresh = metric.fresh()
    assert fresh.own.count == 0
    assert fresh.network is metric.network
    assert fresh.reference is reference
    assert fresh.measure == metric.measure
    assert fresh.force
    assert "9 images of some" in fresh.measure.protocol


# ---- kernel ----


def brute_kid(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Unbiased MMD² with (xᵀy / d + 1)³, by its definition."""

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    m = len(x)
    same = [[kernel(a, b) for j, b in enumerate(z) if i != j] for z in (x, y) for i, a in enumerate(z)]
    cross = [kernel(a, b) for a in x for b in y]
    return float(np.sum(same) / (m * (m - 1)) - 2 * np.mean(cross))


@needs_fidelity
def test_a_kernel_distance_is_its_definition() -> None:
    own, originals = images(20), images(20, 1, 60, 200)
    metric = filled(KernelMetric(Corners()), own, originals)
    # All images are in every subset, so that all subsets give the same number.
    assert metric.value() == pytest.approx(brute_kid(features(own), features(originals)), rel=1e-6)
    assert metric.remark == "subsets of 20 images only"
    assert metric.fresh().measure == metric.measure
    with pytest.raises(InputError, match="1 images: a kernel distance needs at least 2"):
        filled(KernelMetric(Corners()), own[:1], own[:1]).value()


def test_a_reservoir_is_a_fair_sample_of_bounded_size() -> None:
    counts = np.zeros(40)
    for seed in range(600):
        reservoir = Reservoir(1, seed, "test", capacity=10)
        for number in range(40):
            reservoir.add(np.array([float(number)]))
        assert len(reservoir) == 10
        assert reservoir.count == 40
        counts[reservoir.values()[:, 0].astype(int)] += 1
    assert counts.sum() == 6_000
    assert abs(counts - 150).max() < 5 * np.sqrt(150 * 0.75)
    one, other = (Reservoir.of(iter(np.eye(9)), 9, 0, "test") for _ in range(2))
    assert (one.values() == other.values()).all()


# ---- records ----


def fid_of(metric: SetMetric, output: Path, split: str = "all") -> Score | None:
    """The number of a set in an evaluation; None where it has none."""
    evaluation = Evaluation(BlobSet(6), (InputItself(),), Metrics((), (metric,)), str(output))
    return evaluation(on_this_machine()).scores["input"][split].get("fid")


def record_of(metric: SetMetric) -> str:
    """Where an evaluation keeps a metric's numbers."""
    return SetStep(BlobSet(), (), "out", (metric,)).uri("input")


def test_the_same_output_takes_force_up_and_drops_it_again(tmp_path: Path) -> None:
    plain, forced = FrechetMetric(Corners()), FrechetMetric(Corners(), force=True)
    assert fid_of(plain, tmp_path, "mild") is None
    found = fid_of(forced, tmp_path, "mild")
    assert found is not None
    assert found.remark == "forced: 3 images, fewer than the 6 features"
    assert fid_of(plain, tmp_path, "mild") is None


def test_the_same_output_notices_another_reference_of_the_same_name_and_count(tmp_path: Path) -> None:
    near, far = (
        FrechetMetric(Corners(), reference=Statistics(np.full(6, mean), np.eye(6), 9, "a set"))
        for mean in (90.0, 900.0)
    )
    assert near.measure == far.measure
    first, second = fid_of(near, tmp_path), fid_of(far, tmp_path)
    assert first is not None
    assert second is not None
    assert second.mean > first.mean
    assert fid_of(near, tmp_path) == first


def test_a_record_is_of_force_and_of_what_the_reference_holds() -> None:
    def frechet(mean: float, spread: float, force: bool = False) -> SetMetric:
        reference = Statistics(np.full(6, mean), spread * np.eye(6), 9, "a set")
        return FrechetMetric(Corners(), reference=reference, force=force)

    def kernel(mean: float) -> SetMetric:
        vectors = (np.full(6, mean) for _ in range(9))
        return KernelMetric(Corners(), reference=(Reservoir.of(vectors, 6, 0, "reference"), "9 images of a set"))

    different = [frechet(0, 1), frechet(1, 1), frechet(0, 2), frechet(0, 1, True), kernel(0), kernel(1)]
    assert len({record_of(metric) for metric in different}) == len(different)
    for metric in different:
        assert record_of(pickle.loads(pickle.dumps(metric))) == record_of(metric.fresh()) == record_of(metric)
    assert record_of(frechet(0, 1)) == record_of(frechet(0, 1))
    assert record_of(kernel(0)) == record_of(kernel(0))


def test_what_has_neither_force_nor_reference_is_recorded_under_its_measures_alone() -> None:
    for metric in (FrechetMetric(Corners()), KernelMetric(Corners())):
        assert record_of(metric) == f"out/work/input/{measures_key([metric.measure])}-sets.json"


# ---- statistics files ----


def test_statistics_come_back_and_are_of_one_network_only(tmp_path: Path) -> None:
    path, network = str(tmp_path / "ref.npz"), Corners()
    values = features(images(50))
    statistics = Statistics(values.mean(axis=0), np.cov(values.T), 50, "noise")
    write_statistics(path, statistics, network)
    found = read_statistics(path, network)
    assert (found.mean == statistics.mean).all()
    assert (found.covariance == statistics.covariance).all()
    assert (found.count, found.about) == (50, "noise")
    other = Corners()
    other.digest = "1" * 64
    with pytest.raises(InputError, match=r"is of other weights of it \(SHA-256 0000"):
        read_statistics(path, other)
    other.name = "inception"
    with pytest.raises(InputError, match="is of the network 'corners-6', and the features here are of 'inception'"):
        read_statistics(path, other)


def test_a_file_that_does_not_say_its_network_needs_somebody_who_does(tmp_path: Path) -> None:
    path = tmp_path / "plain.npz"
    np.savez(path, mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(InputError, match="does not say which network's features it is of: state it"):
        read_statistics(str(path), Corners())
    with pytest.raises(InputError, match="is stated to be of 'clip', and the features here are of 'corners-6'"):
        read_statistics(str(path), Corners(), "clip")
    assert read_statistics(str(path), Corners(), "corners-6").count is None


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"mu": np.zeros(6)}, "it holds mu; expected mu and sigma"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"mu of shape \(5,\).* it is of another network or layer"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "not finite"),
        ({"mu": np.zeros(6), "sigma": np.triu(np.ones((6, 6)))}, "sigma is not symmetric"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path: Path, arrays: dict[str, Any], text: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=text):
        read_statistics(str(tmp_path / "bad.npz"), Corners(), "corners-6")
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match=r"is no readable .npz file"):
        read_statistics(str(tmp_path / "bad.npz"), Corners(), "corners-6")


def test_a_folders_statistics_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDBFR_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "reference"
    folder.mkdir()
    own = images(9)
    for number, image in enumerate(own):
        (folder / f"{number}.png").write_bytes(encode_image(image, "png"))
    first = reference_statistics(str(folder), Corners())
    np.testing.assert_allclose(first.covariance, np.cov(features(own).T))
    monkeypatch.setattr(metric_choice, "statistics_of", None)
    assert (reference_statistics(str(folder), Corners()).covariance == first.covariance).all()
    (folder / "9.png").write_bytes(encode_image(own[0], "png"))
    with pytest.raises(TypeError):  # another folder is another reference
        reference_statistics(str(folder), Corners())


def test_files_that_were_replaced_by_others_of_the_same_size_and_time_are_another_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDBFR_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "reference"
    folder.mkdir()
    for number, image in enumerate(images(9)):
        (folder / f"{number}.png").write_bytes(encode_image(image, "png"))
    first = reference_statistics(str(folder), Corners())
    before = (folder / "0.png").stat()
    other = next(image for image in images(99, 1) if len(encode_image(image, "png")) == before.st_size)
    (folder / "0.png").write_bytes(encode_image(other, "png"))
    os.utime(folder / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    second = reference_statistics(str(folder), Corners())
    assert (second.mean != first.mean).any()
    np.testing.assert_allclose(second.mean, features(np.stack([other, *images(9)[1:]])).mean(axis=0))


def test_a_relative_reference_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDBFR_CACHE", str(tmp_path / "cache"))
    for name in ("one", "other"):
        (tmp_path / name / "reference").mkdir(parents=True)
        for number, image in enumerate(images(9)):
            (tmp_path / name / "reference" / f"{number}.png").write_bytes(encode_image(image, "png"))
        monkeypatch.chdir(tmp_path / name)
        assert reference_statistics("reference", Corners()).about == str(tmp_path / name / "reference")
    monkeypatch.setattr(metric_choice, "statistics_of", None)
    assert reference_statistics("../one/reference", Corners()).about == str(tmp_path / "one" / "reference")


# ---- Inception, by torch-fidelity ----


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch-fidelity publishes it, with random weights."""
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
    )
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        torch.save(module.FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    return path


def test_features_are_torch_fidelitys_on_the_same_pixels(inception: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("compat", ["2048"], feature_extractor_weights_path=str(inception))
    face = blob_faces(1, 64)[0]
    network = InceptionFeatures(inception)
    expected = theirs(torch.from_numpy(face).permute(2, 0, 1)[None])[0][0].numpy()
    np.testing.assert_allclose(network.features(face), expected, rtol=1e-5)
    assert network.features(face).shape == (2_048,)
    again = pickle.loads(pickle.dumps(network))
    np.testing.assert_array_equal(again.features(face), network.features(face))
    assert (again.name, again.digest) == (network.name, network.digest)
    assert "299 px" in network.about


def test_fid_is_named_with_its_protocol(inception: Path, tmp_path: Path) -> None:
    network = InceptionFeatures(inception)
    write_statistics(
        str(tmp_path / "ffhq.npz"), Statistics(np.zeros(2_048), np.eye(2_048), 70_000, "FFHQ, 70,000 images"), network
    )
    options = MetricOptions(inception=str(inception), reference=str(tmp_path / "ffhq.npz"))
    _, sets, missing = make_metrics(["fid", "fid-reference", "kid"], options)
    assert missing == []
    protocols = {metric.measure.name: metric.measure.protocol for metric in sets}
    assert "the originals of the same images" in protocols["fid"]
    assert "70,000 images of FFHQ, 70,000 images" in protocols["fid-reference"]
    for protocol in protocols.values():
        assert "inception-v3-compat" in protocol
        assert network.digest[:12] in protocol
    with pytest.raises(InputError, match="a kernel distance needs the reference images themselves"):
        make_metrics(["kid-reference"], options)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    torch.save({"some": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(
        WeightsError, match=r"other.pth is not the Inception-v3 of FID's authors.*; supply weights-inception"
    ):
        InceptionFeatures(tmp_path / "other.pth").features(blob_faces(1)[0])


def test_a_file_of_another_network_is_missing_before_anything_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    torch.save({"some": torch.zeros(1)}, tmp_path / "other.pth")
    options = MetricOptions(inception=str(tmp_path / "other.pth"), reference=str(tmp_path))
    pairs, sets, missing = make_metrics(["psnr", "fid", "kid", "kid-reference"], options)
    assert len(pairs) == 1
    assert sets == []
    assert [one.name for one in missing] == ["fid", "kid", "kid-reference"]
    assert all("other.pth is not the Inception-v3 of FID's authors" in one.reason for one in missing)


def test_another_machine_finds_its_own_inception(
    inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDBFR_OFFLINE", "1")
    given = tmp_path / "given.pth"
    given.symlink_to(inception)
    network, face = InceptionFeatures(given), blob_faces(1, 64)[0]
    expected = network.features(face)
    given.unlink()
    load_inception.cache_clear()
    with pytest.raises(WeightsError, match=rf"lacks the weights .*{network.digest}.* copy them there to {given}"):
        pickle.loads(pickle.dumps(network)).features(face)
    monkeypatch.setenv("LDBFR_INCEPTION", str(inception))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(network)).features(face), expected)


# ---- dlib ----


@pytest.mark.skipif(not IdentityModel.is_installed(), reason="the extra `identity` is not installed")
def test_dlibs_distance_is_never_called_fid() -> None:
    _, sets, _ = make_metrics(["frechet-dlib"], MetricOptions(framing="ffhq"))
    measure = sets[0].measure
    assert "FID" not in measure.label + measure.name
    assert "dlib's face recognition network" in measure.protocol
    assert DlibFeatures("ffhq").name != DlibFeatures("tight").name
    face = blob_faces(1, 64)[0]
    assert DlibFeatures().features(face).shape == (128,)


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match=r"FID and KID need torch-fidelity .*pip install 'ldbfr\[metrics\]'"):
        InceptionFeatures()
