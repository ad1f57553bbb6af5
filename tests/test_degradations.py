"""Equation (7) against closed forms, brute force and invariances; no golden images."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ldbfr.degradations import (
    PROFILES,
    Degradation,
    DegradationProfile,
    apply,
    degradation_generator,
    draw,
    gaussian_kernel,
    get_profile,
)
from ldbfr.errors import ConfigError, InputError

# Nothing happens: the cases below change one thing each.
IDENTITY = Degradation(
    sigma_x=0.0,
    sigma_y=0.0,
    theta=0.0,
    scale=1.0,
    noise_kind="gaussian",
    noise_level=0.0,
    jpeg_quality=100,
    noise_seed=0,
)
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in JPEG


def grey(side: int, value: int) -> NDArray[np.uint8]:
    return np.full((side, side, 3), value, np.uint8)


def texture(side: int, *, smooth: float = 1.0, colour: bool = True) -> NDArray[np.uint8]:
    """Blurred white noise, stretched to the full range."""
    noise = np.random.default_rng(0).random((side, side, 3 if colour else 1), dtype=np.float32)
    values = np.asarray(cv2.GaussianBlur(noise, (0, 0), smooth)).reshape(side, side, -1)
    values = (values - values.min()) / (values.max() - values.min())
    return np.repeat(np.rint(values * 255).astype(np.uint8), 1 if colour else 3, axis=2)


def noise_of_luma(degradation: Degradation, value: int) -> float:
    """Standard deviation of a degraded grey image's luma. (JPEG averages chroma over 2x2 pixels, luma it keeps.)"""
    return float((apply(degradation, grey(256, value)) @ LUMA).std())


def brute_force_blur(image: NDArray[np.uint8], sigma_x: float, sigma_y: float, theta: float) -> NDArray[np.float64]:
    """The sum over all shifts of the mirrored image times exp(-d' C^-1 d / 2), C the covariance matrix."""
    radius = math.ceil(5 * max(sigma_x, sigma_y))
    rotation = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    precision = np.linalg.inv(rotation @ np.diag([sigma_x**2, sigma_y**2]) @ rotation.T)
    padded = np.pad(image.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    total, weights = np.zeros(image.shape), 0.0
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            shift = np.array([dx, dy])
            weight = math.exp(-0.5 * float(shift @ precision @ shift))
            rows, columns = (slice(radius - d, radius - d + image.shape[0]) for d in (dy, dx))
            total += weight * padded[rows, columns]
            weights += weight
    return total / weights


@pytest.mark.parametrize("value", [0, 1, 77, 128, 255])
@pytest.mark.parametrize("sigma_y", [6.0, 2.0], ids=["isotropic", "anisotropic"])
def test_a_constant_image_stays_constant(value: int, sigma_y: float) -> None:
    degradation = replace(IDENTITY, sigma_x=6.0, sigma_y=sigma_y, theta=0.5, scale=3.7, jpeg_quality=40)
    assert np.abs(apply(degradation, grey(256, value)).astype(int) - value).max() <= 1


def test_the_identity_changes_only_what_jpeg_rounds() -> None:
    image = texture(64, colour=False)
    assert np.abs(apply(IDENTITY, image).astype(int) - image).max() <= 2


@pytest.mark.parametrize(
    ("sigma_x", "sigma_y", "theta"), [(1.7, 1.7, 0.0), (0.4, 0.4, 0.0), (2.5, 0.8, 0.6), (0.05, 2.0, 2.3)]
)
def test_blur_is_convolution_with_the_gaussian(sigma_x: float, sigma_y: float, theta: float) -> None:
    side, image = 48, texture(48, colour=False)
    to_reference = 512 / side
    degradation = replace(IDENTITY, sigma_x=sigma_x * to_reference, sigma_y=sigma_y * to_reference, theta=theta)
    expected = brute_force_blur(image, max(sigma_x, 0.1), sigma_y, theta)
    error = apply(degradation, image) - expected
    assert np.abs(error).max() <= 2.0
    assert abs(error.mean()) < 0.1


@pytest.mark.parametrize(("sigma_x", "sigma_y", "theta"), [(3.0, 3.0, 0.0), (6.0, 2.0, 0.4), (1.5, 4.0, 2.5)])
def test_second_moments_of_the_kernel_are_its_covariance(sigma_x: float, sigma_y: float, theta: float) -> None:
    kernel = gaussian_kernel(sigma_x, sigma_y, theta).astype(np.float64)
    radius = kernel.shape[0] // 2
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    covariance = np.array([[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)])
    variances, axes = np.linalg.eigh(covariance)
    assert kernel.sum() == pytest.approx(1.0, abs=1e-6)
    assert np.sqrt(variances) == pytest.approx(sorted([sigma_x, sigma_y]), rel=5e-3)
    if sigma_x != sigma_y:
        long_axis = axes[:, 1]
        expected = theta if sigma_x > sigma_y else theta + math.pi / 2
        assert math.atan2(long_axis[1], long_axis[0]) % math.pi == pytest.approx(expected % math.pi, abs=1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
@pytest.mark.parametrize("level", [4.0, 10.0, 20.0])
def test_noise_at_mid_grey_has_the_stated_deviation(kind: Any, level: float) -> None:
    measured = noise_of_luma(replace(IDENTITY, noise_kind=kind, noise_level=level), 128)
    assert measured == pytest.approx(level * np.linalg.norm(LUMA), rel=0.04)


@pytest.mark.parametrize("value", [32, 64, 200])
def test_poisson_noise_grows_with_the_root_of_the_signal_and_gaussian_noise_does_not(value: int) -> None:
    level = 8.0
    poisson = noise_of_luma(replace(IDENTITY, noise_kind="poisson", noise_level=level), value)
    gaussian = noise_of_luma(replace(IDENTITY, noise_level=level), value)
    assert poisson == pytest.approx(level * math.sqrt(value / 127.5) * np.linalg.norm(LUMA), rel=0.05)
    assert gaussian == pytest.approx(level * np.linalg.norm(LUMA), rel=0.05)


def test_noise_keeps_the_mean_and_leaves_black_dark_under_poisson() -> None:
    degradation = replace(IDENTITY, noise_kind="poisson", noise_level=30.0)
    assert apply(degradation, grey(256, 128)).mean() == pytest.approx(128, abs=0.5)
    assert apply(degradation, grey(64, 0)).max() == 0


def test_noise_is_drawn_in_the_low_resolution_domain() -> None:
    noise = apply(replace(IDENTITY, scale=8.0, noise_level=20.0), grey(512, 128)).astype(float) @ LUMA - 128
    neighbours = np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]
    far = np.corrcoef(noise[:, 24:].ravel(), noise[:, :-24].ravel())[0, 1]
    assert neighbours > 0.9
    assert abs(far) < 0.1


def test_lower_jpeg_quality_means_a_larger_error() -> None:
    image = texture(128)
    errors = [
        float(np.square(apply(replace(IDENTITY, jpeg_quality=q), image).astype(float) - image).mean())
        for q in (100, 90, 75, 60, 40, 20, 5)
    ]
    assert errors == sorted(errors)
    assert len(set(errors)) == len(errors)


def test_jpeg_subsamples_chroma_as_cameras_do() -> None:
    """One-pixel stripes of two colours of equal luma cannot survive 4:2:0. (Of equal luma as RGB, not as BGR.)"""
    image = grey(64, 128)
    image[:, ::2] = (88, 128, 233)  # luma 128 to within a tenth
    stripes = apply(IDENTITY, image).astype(int)
    assert np.abs(stripes[:, 16:-16:2] - stripes[:, 17:-16:2]).max() < 15


def rank(degradation: Degradation, side: int) -> int:
    """Rank of a degraded texture as a matrix: interpolating n x n pixels gives n, rounding adds about 0.6 sqrt(S)."""
    image = 64 + texture(side, smooth=side / 64, colour=False) // 2  # too little contrast for clipping
    singular_values = np.linalg.svd(apply(degradation, image)[..., 0].astype(float), compute_uv=False)
    return int((singular_values > 1.5 * math.sqrt(side)).sum())


@pytest.mark.parametrize(("side", "scale", "pixels"), [(512, 64, 8), (256, 51.2, 10), (256, 40, 13), (64, 512, 1)])
def test_downsampling_keeps_max_1_round_s_over_r_pixels(side: int, scale: float, pixels: int) -> None:
    assert rank(replace(IDENTITY, scale=scale), side) == pixels


def test_noise_and_jpeg_come_before_the_upsampling() -> None:
    assert rank(replace(IDENTITY, scale=64.0, noise_level=10.0), 512) == 8
    assert rank(replace(IDENTITY, scale=64.0, jpeg_quality=10), 512) <= 8


@pytest.mark.parametrize("sigma_y", [5.0, 2.0], ids=["isotropic", "anisotropic"])
def test_every_size_loses_the_same_detail(sigma_y: float) -> None:
    """Degrading and then halving is halving and then degrading, with the same draw."""
    degradation = replace(IDENTITY, sigma_x=5.0, sigma_y=sigma_y, theta=0.7, scale=6.0)
    image = texture(512, smooth=6.0)

    def halve(pixels: NDArray[np.uint8]) -> NDArray[Any]:
        return cv2.resize(pixels, (256, 256), interpolation=cv2.INTER_AREA)

    difference = halve(apply(degradation, image)).astype(float) - apply(degradation, halve(image).astype(np.uint8))
    lost = halve(image).astype(float) - apply(degradation, halve(image).astype(np.uint8))
    assert np.sqrt(np.square(difference).mean()) < 1.0
    assert np.sqrt(np.square(lost).mean()) > 5.0


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("side", [1, 2, 17, 64])
def test_any_side_works_and_the_same_draw_gives_the_same_bytes(profile: str, side: int) -> None:
    degradation, image = draw(PROFILES[profile], degradation_generator(7, profile, side)), texture(side)
    before = image.copy()
    first = apply(degradation, image)
    assert first.shape == image.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first, apply(Degradation.from_json(degradation.to_json()), image))
    assert np.array_equal(image, before)


def test_the_extremes_of_what_a_degradation_may_say_can_be_applied() -> None:
    extreme = Degradation(128.0, 1.0, math.pi, 512.0, "poisson", 255.0, 1, 2**53 - 1)
    for degradation in (extreme, replace(extreme, sigma_y=128.0, scale=1.0, noise_level=0.01)):
        assert apply(degradation, texture(96)).shape == (96, 96, 3)


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_the_noise_depends_on_its_seed(kind: Any) -> None:
    degradation, image = replace(IDENTITY, noise_kind=kind, noise_level=10.0), grey(32, 128)
    assert np.array_equal(apply(degradation, image), apply(degradation, image))
    assert not np.array_equal(apply(degradation, image), apply(replace(degradation, noise_seed=1), image))


def test_the_bytes_do_not_depend_on_threads_or_memory_layout() -> None:
    image = texture(256)
    flipped = image[:, ::-1]
    flipped.flags.writeable = False
    degradations = [draw(PROFILES["wide"], degradation_generator(3, i)) for i in range(6)]
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        alone = [apply(degradation, flipped) for degradation in degradations]
        cv2.setNumThreads(3)
        together = [apply(degradation, flipped.copy()) for degradation in degradations]
    finally:
        cv2.setNumThreads(threads)
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


# The range of a profile that each field of a draw must fill.
LIMITS: dict[str, Callable[[DegradationProfile], tuple[float, float]]] = {
    "sigma_x": lambda profile: profile.sigma,
    "sigma_y": lambda profile: profile.sigma,
    "scale": lambda profile: profile.scale,
    "noise_level": lambda profile: profile.noise,
    "jpeg_quality": lambda profile: profile.jpeg,
}


@pytest.mark.parametrize("name", PROFILES)
def test_draws_fill_their_ranges_evenly(name: str) -> None:
    profile, generator = PROFILES[name], degradation_generator(0, name)
    draws = [draw(profile, generator) for _ in range(2000)]
    for field, limits in LIMITS.items():
        values = np.array([getattr(one, field) for one in draws], dtype=float)
        low, high = limits(profile)
        width = high - low
        assert low <= values.min() <= low + 0.01 * width
        assert high - 0.01 * width <= values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.04 * width)
        variance = width * (width + 2) / 12 if field == "jpeg_quality" else width**2 / 12  # discrete, continuous
        assert values.std() == pytest.approx(math.sqrt(variance), rel=0.05)
    assert np.mean([one.noise_kind == "poisson" for one in draws]) == pytest.approx(profile.poisson, abs=0.05)
    anisotropic = [one for one in draws if one.sigma_x != one.sigma_y]
    assert len(anisotropic) / len(draws) == pytest.approx(profile.anisotropic, abs=0.05)
    assert all(one.theta == 0 for one in draws if one.sigma_x == one.sigma_y)
    if anisotropic:
        assert np.mean([one.theta for one in anisotropic]) == pytest.approx(math.pi / 2, abs=0.1)
    assert len({one.noise_seed for one in draws}) == len(draws)


def test_the_profiles_are_the_papers() -> None:
    stated = {name: (p.sigma, p.scale, p.noise, p.jpeg) for name, p in PROFILES.items()}
    assert stated == {
        "train": ((0.2, 10), (1, 8), (0, 15), (60, 100)),
        "mild": ((3, 5), (4, 4), (5, 20), (60, 80)),
        "medium": ((5, 7), (8, 8), (15, 40), (40, 60)),
        "severe": ((7, 9), (16, 16), (25, 50), (30, 40)),
        "wide": ((0.2, 12), (1, 18), (0, 50), (30, 100)),
    }
    for limits in LIMITS.values():  # wide covers all the others
        low, high = limits(PROFILES["wide"])
        assert all(low <= limits(p)[0] <= limits(p)[1] <= high for p in PROFILES.values())


def test_a_draw_takes_the_same_numbers_whatever_the_profile() -> None:
    after = []
    for profile in PROFILES.values():
        generator = degradation_generator(1, "a")
        draw(profile, generator)
        after.append(generator.random())
    assert len(set(after)) == 1


def test_a_draw_is_a_function_of_its_keys_alone() -> None:
    whats: list[tuple[int | str, ...]] = [(), (0,), ("0",), (1, 2), (12,), ("1, 2",), (2, 1), (-1,), (2**80,)]
    firsts = [degradation_generator(seed, *what).random() for seed in (0, 1) for what in whats]
    assert len(set(firsts)) == len(firsts)
    assert degradation_generator(0, 1, 2).random() == degradation_generator(0, np.int64(1), 2).random()


def test_another_process_draws_the_same() -> None:
    code = "from ldbfr.degradations import *; print(draw(PROFILES['wide'], degradation_generator(5, 'x', 9)).to_json())"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    here = draw(PROFILES["wide"], degradation_generator(5, "x", 9))
    assert Degradation.from_json(text) == here
    # The one golden number: were it to change, no recorded run could be repeated.
    assert degradation_generator(5, "x", 9).random() == 0.004997383972673242


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


@settings(deadline=None)  # a busy machine is not a failure
@given(
    st.builds(
        Degradation,
        sigma_x=between(0, 128),
        sigma_y=between(0, 128),
        theta=between(0, math.pi),
        scale=between(1, 512),
        noise_kind=st.sampled_from(["gaussian", "poisson"]),
        noise_level=between(0, 255),
        jpeg_quality=st.integers(1, 100),
        noise_seed=st.integers(0, 2**53 - 1),
    )
)
def test_json_round_trip_is_exact(degradation: Degradation) -> None:
    text = degradation.to_json()
    assert "\n" not in text
    assert Degradation.from_json(text) == degradation


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sigma_x", -1, r"sigma_x is -1\. Give a number from 0\.0 to 128\.0\."),
        ("sigma_y", "wide", r"sigma_y is 'wide'\. Give a number"),
        ("theta", 4, r"theta is 4\."),
        ("scale", 0.5, r"scale is 0\.5\. Give a number from 1\.0 to 512\.0\."),
        ("noise_kind", "salt", r"noise_kind is 'salt'\. Give 'gaussian' or 'poisson'\."),
        ("noise_level", math.nan, r"noise_level is nan\."),
        ("noise_level", math.inf, r"noise_level is inf\."),
        ("jpeg_quality", 80.5, r"jpeg_quality is 80\.5\. Give an integer from 1 to 100\."),
        ("jpeg_quality", 0, r"jpeg_quality is 0\."),
        ("jpeg_quality", True, r"jpeg_quality is True\."),
        ("noise_seed", -1, r"noise_seed is -1\."),
        ("noise_seed", None, r"noise_seed is None\."),
        ("blur", 3, r"no field 'blur'\. Its fields are: sigma_x, "),
    ],
)
def test_impossible_json_is_refused_by_field(field: str, value: object, message: str) -> None:
    values = json.loads(IDENTITY.to_json()) | {field: value}
    with pytest.raises(ConfigError, match=message):
        Degradation.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be one JSON object: .* Given: '{'"),
        ("[1]", r"must be one JSON object with named fields\. Given: '\[1\]'"),
        ('{"sigma_x": 1}', "lacks the field 'sigma_y'"),
    ],
)
def test_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Degradation.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": (5, 3)}, r"sigma is \(5, 3\): the minimum is above the maximum"),
        ({"scale": (0.5, 2)}, r"scale \(minimum\) is 0\.5\. Give a number from 1\.0"),
        ({"jpeg": (60, 101)}, r"jpeg \(maximum\) is 101\. Give an integer from 1 to 100"),
        ({"anisotropic": 1.5}, r"anisotropic is 1\.5\. Give a number from 0\.0 to 1\.0"),
    ],
)
def test_an_impossible_profile_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PROFILES["train"], **change)


def test_an_unknown_profile_is_refused_with_the_known_names() -> None:
    assert get_profile("mild") is PROFILES["mild"]
    with pytest.raises(ConfigError, match=r"'awful'\. Choose one of: train, mild, medium, severe, wide\."):
        get_profile("awful")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 9, 3), np.uint8), r"shape \(8, 9, 3\) and type uint8: expected \(S, S, 3\)"),
        (np.zeros((8, 8), np.uint8), r"shape \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"shape \(8, 8, 4\)"),
        (np.zeros((0, 0, 3), np.uint8), r"shape \(0, 0, 3\)"),
        (np.zeros((8, 8, 3), np.float32), r"type float32: expected .* uint8"),
    ],
)
def test_other_images_are_refused(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply(IDENTITY, image)
