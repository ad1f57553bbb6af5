"""From the names of metrics to metrics; what cannot be had here is listed as missing, with what to do about it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ldbfr import storage
from ldbfr.errors import ConfigError, InputError, StorageError, WeightsError
from ldbfr.evaluation.backbones import Net
from ldbfr.evaluation.features import DlibFeatures, FeatureNetwork, InceptionFeatures
from ldbfr.evaluation.framing import Framing
from ldbfr.evaluation.iqa import PREFIX, PyIQA
from ldbfr.evaluation.moments import Moments
from ldbfr.evaluation.pair_metrics import LPIPS, PSNR, SSIM, Blur, Identity, Landmarks, SharpnessRatio
from ldbfr.evaluation.pairing import READERS, ImageFiles
from ldbfr.evaluation.results import Missing, PairMetric, SetMetric
from ldbfr.evaluation.set_metrics import FrechetMetric, KernelMetric, Reservoir, vector_of
from ldbfr.evaluation.statistics import SUFFIX, Statistics, read_statistics, write_statistics
from ldbfr.images import decode_image
from ldbfr.places import absolute
from ldbfr.progress import Progress, Tally
from ldbfr.weights import cache_folder

log = logging.getLogger(__name__)

REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class MetricOptions:
    """What metrics need to know."""

    framing: Framing = "tight"
    """Of the faces: dlib's networks see the tight frame, which is cut out of FFHQ's."""
    device: str = "cpu"
    """Where Inception, LPIPS and pyiqa's networks run."""
    reference: str | None = None
    """Folder of images, or statistics file (.npz), that fid-reference and kid-reference compare with."""
    reference_network: str | None = None
    """Which network's a statistics file is, where it does not say itself."""
    inception: str | None = None
    """Path of Inception-v3's weights; environment, cache or download when left out."""
    alexnet: str | None = None
    """Path of AlexNet's weights, for lpips-alex."""
    vgg16: str | None = None
    """Path of VGG-16's weights, for lpips-vgg."""
    squeezenet: str | None = None
    """Path of SqueezeNet's weights, for lpips-squeeze."""
    force: bool = False
    """Give Fréchet distances of fewer images than features too, marked."""
    seed: int = 0
    """Of what kernel distances sample."""


PairMaker = Callable[[MetricOptions], PairMetric]
SetMaker = Callable[[MetricOptions], SetMetric]


def _lpips(net: Net, options: MetricOptions) -> PairMetric:
    path = {"alex": options.alexnet, "vgg": options.vgg16, "squeeze": options.squeezenet}[net]
    return LPIPS(net, path, options.device)


def _fid(options: MetricOptions) -> SetMetric:
    return FrechetMetric(InceptionFeatures(options.inception, options.device), force=options.force)


def _fid_reference(options: MetricOptions) -> SetMetric:
    network = InceptionFeatures(options.inception, options.device)
    statistics = reference_statistics(reference_of(options), network, options.reference_network)
    return FrechetMetric(network, "fid-reference", "FID (reference set)", statistics, options.force)


def _kid(options: MetricOptions) -> SetMetric:
    return KernelMetric(InceptionFeatures(options.inception, options.device), seed=options.seed)


def _kid_reference(options: MetricOptions) -> SetMetric:
    network, place = InceptionFeatures(options.inception, options.device), absolute(reference_of(options))
    if place.endswith(SUFFIX):
        raise InputError(f"{place}: a kernel distance needs the reference images themselves; give their folder")
    sample = Reservoir.of(features_of(place, network), network.size, options.seed, "reference")
    return KernelMetric(
        network, "kid-reference", "KID (reference set)", (sample, f"{sample.count:,} images of {place}"), options.seed
    )


def _frechet_dlib(options: MetricOptions) -> SetMetric:
    label = "Fréchet distance of dlib embeddings"
    return FrechetMetric(DlibFeatures(options.framing), "frechet-dlib", label, force=options.force)


PAIR_METRICS: dict[str, PairMaker] = {
    "psnr": lambda _: PSNR(),
    "ssim": lambda _: SSIM(),
    "lpips-alex": partial(_lpips, "alex"),
    "lpips-vgg": partial(_lpips, "vgg"),
    "lpips-squeeze": partial(_lpips, "squeeze"),
    "identity": lambda options: Identity(options.framing),
    "landmarks": lambda options: Landmarks(options.framing),
    "sharpness": lambda _: SharpnessRatio(),
    "blur": lambda _: Blur(),
}
SET_METRICS: dict[str, SetMaker] = {
    "fid": _fid,
    "fid-reference": _fid_reference,
    "kid": _kid,
    "kid-reference": _kid_reference,
    "frechet-dlib": _frechet_dlib,
}
DEFAULT_METRICS = (
    "psnr",
    "ssim",
    "lpips-alex",
    "fid",
    "identity",
    "landmarks",
    "sharpness",
    "blur",
    "frechet-dlib",
)
"""All that stand in papers of the field, and what stands in for them where nothing can be downloaded."""


def metric_names() -> list[str]:
    """All names but pyiqa's, which are "pyiqa:NAME"."""
    return [*PAIR_METRICS, *SET_METRICS]


def make_metrics(
    names: Sequence[str] = DEFAULT_METRICS, options: MetricOptions | None = None
) -> tuple[list[PairMetric], list[SetMetric], list[Missing]]:
    """The metrics of these names, in their order; those whose library or weights are not to be had become `Missing`.

    Raises:
        ConfigError: a name is unknown or comes twice, or a reference is needed and not given.
        InputError: the reference cannot be used.
    """
    options = options or MetricOptions()
    check_names(names, options)
    pairs: list[PairMetric] = []
    sets: list[SetMetric] = []
    missing: list[Missing] = []
    for name in names:
        try:
            if name in SET_METRICS:
                sets.append(SET_METRICS[name](options))
            elif name in PAIR_METRICS:
                pairs.append(PAIR_METRICS[name](options))
            else:
                pairs.append(PyIQA(name.removeprefix(PREFIX), options.device))
        except (ConfigError, WeightsError) as error:
            log.warning("%s is missing: %s", name, error)
            missing.append(Missing(name=name, reason=str(error)))
    return pairs, sets, missing


def check_names(names: Sequence[str], options: MetricOptions) -> None:
    """ConfigError for a name that is unknown or comes twice, or lacks its reference."""
    known = metric_names()
    for name in names:
        if name not in known and not name.startswith(PREFIX):
            raise ConfigError(f"there is no metric {name!r}; expected {', '.join(known)}, or {PREFIX}NAME")
        if names.count(name) > 1:
            raise ConfigError(f"the metric {name} is named twice; name it once")
        if name.endswith("-reference"):
            reference_of(options)


def reference_of(options: MetricOptions) -> str:
    """The place of the reference; ConfigError where there is none."""
    if options.reference is None:
        raise ConfigError(
            "fid-reference and kid-reference compare with another set: give its folder (such as FFHQ's 70,000 images), "
            f"or for FID a statistics file ({SUFFIX})"
        )
    return options.reference


def reference_statistics(place: str, network: FeatureNetwork, stated: str | None = None) -> Statistics:
    """Of a statistics file, or of a folder, whose own are kept in the cache.

    There they are found by the folder's absolute place, the network, and the digest of every file's content: the folder
    is read, which takes a small part of the time that the network would need, and replaced files are noticed whatever
    their size and their time say.

    Raises:
        InputError: the file is of another network, or the folder has no images.
        StorageError: it cannot be read.
    """
    place = absolute(place)
    if place.endswith(SUFFIX):
        return read_statistics(place, network, stated)
    what = [place, network.name, network.digest, content_of(place)]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    kept = str(cache_folder() / "statistics" / f"{digest[:32]}{SUFFIX}")
    if storage.exists(kept):
        log.info("statistics of %s are in the cache: %s", place, kept)
        return read_statistics(kept, network)
    statistics = statistics_of(place, network)
    try:
        write_statistics(kept, statistics, network)
    except StorageError as error:
        log.warning("the statistics of %s could not be kept: %s", place, error)
    return statistics


def content_of(place: str) -> list[tuple[str, str]]:
    """Key and SHA-256 of every image of a folder, in the keys' order.

    Raises:
        InputError: no image.
        StorageError: the folder or a file cannot be read.
    """
    files = ImageFiles.of(place).files.values()
    log.info("reading %s images of %s, whose statistics may be in the cache", f"{len(files):,}", place)
    progress = Progress(Tally(len(files)), every=REPORT_SECONDS)
    content = []
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(lambda info: hashlib.sha256(storage.read_bytes(info.uri)).hexdigest(), files)
        for info, digest in zip(files, digests, strict=True):
            content.append((info.key, digest))
            progress.tally.restored += 1
            progress.update()
    return content


def statistics_of(place: str, network: FeatureNetwork) -> Statistics:
    """Mean and covariance of a folder's images; takes as long as the network needs for all of them.

    Raises:
        InputError: no image, or one that cannot be read.
        StorageError: the folder cannot be read.
    """
    moments = Moments(network.size)
    for vector in features_of(place, network):
        moments.add(vector)
    return Statistics(moments.mean, moments.covariance(), moments.count, place)


def features_of(place: str, network: FeatureNetwork) -> Iterator[NDArray[np.float64]]:
    """The features of every image of a folder, in the names' order.

    Raises:
        InputError: no image, or one that cannot be read.
        StorageError: the folder cannot be read.
    """
    files = ImageFiles.of(place).files
    log.info("features of %s", place)
    progress = Progress(Tally(len(files)), every=REPORT_SECONDS)
    for name in sorted(files):
        image = decode_image(storage.read_bytes(files[name].uri), name=files[name].uri)
        yield vector_of(network, image, files[name].uri)
        progress.tally.restored += 1
        progress.update()
