"""An evaluation as a user asks for it, on one machine or on a cluster: names and options to test set and restorers.

Nothing heavy is imported before it is asked for, so that a command's help comes at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from ldbfr.config import DEFAULT_WEIGHTS, check_range
from ldbfr.places import absolute

if TYPE_CHECKING:
    from ldbfr.evaluation.engine import Evaluation, Execution, Metrics
    from ldbfr.evaluation.results import Restorer, Results, TestSet

Framing = Literal["tight", "ffhq"]


@dataclass(frozen=True)
class Measured:
    """What is measured, and what that needs."""

    metrics: tuple[str, ...] = ()
    """Names of metrics, such as psnr ssim lpips-alex fid identity pyiqa:musiq; the usual ones when left out. What
    cannot be had is listed in the report with the reason."""
    framing: Framing | None = None
    """How the faces are framed, for dlib's networks; as the test set says, or else as the weights have it."""
    reference: str | None = None
    """Folder of images, or statistics file (.npz), for fid-reference and kid-reference."""
    reference_network: str | None = None
    """Whose features a statistics file holds, where it does not say itself."""
    inception: str | None = None
    """File of Inception-v3's weights; environment, cache or a checked download when left out."""
    alexnet: str | None = None
    """File of AlexNet's weights, for lpips-alex."""
    vgg16: str | None = None
    """File of VGG-16's weights, for lpips-vgg."""
    squeezenet: str | None = None
    """File of SqueezeNet's weights, for lpips-squeeze."""
    force: bool = False
    """Give Fréchet distances of too few images too, marked."""

    def make(self, framing: Framing, device: str) -> Metrics:
        """The metrics that can be had, and those that cannot.

        Args:
            framing: of the faces, unless it was given.
            device: where networks run.
        """
        from ldbfr.evaluation.engine import Metrics
        from ldbfr.evaluation.metric_choice import DEFAULT_METRICS, MetricOptions, make_metrics

        given = {key: value for key, value in vars(self).items() if key not in ("metrics", "framing")}
        options = MetricOptions(framing=self.framing or framing, device=device, **given)
        pairs, sets, missing = make_metrics(self.metrics or DEFAULT_METRICS, options)
        return Metrics(tuple(pairs), tuple(sets), tuple(missing))


@dataclass(frozen=True)
class TestSetRequest:
    """A test set, what is measured on it, and where the results go: what every such command takes."""

    __test__: ClassVar[bool] = False  # by its name, pytest takes it for one of its own

    testset: Annotated[str, tyro.conf.Positional]
    """A set of `ldbfr testset`, or a folder of low-quality images: local or s3://."""
    output: str
    """Folder or s3://bucket/prefix for results.json, rows.jsonl, report.html, report.md and the restored images."""
    measured: Annotated[Measured, tyro.conf.OmitArgPrefixes] = field(default_factory=Measured)
    hq: str | None = None
    """Folder of the originals, by the same names, where the test set is a folder of low-quality images."""
    kind: Literal["auto", "lfw", "wider", "folder"] = "auto"
    """What the test set is; lfw and wider are checked to be whole."""
    limit: int | None = None
    """Images of each split, the first by name; all when left out."""
    batch_size: int = 16
    """Images that are restored together; it may change the last bit of a result."""
    seed: int = 0
    """Of the noise, and of the intervals."""

    def test_set(self) -> TestSet:
        """The images."""
        from ldbfr.evaluation.testsets import open_testset

        return open_testset(absolute(self.testset), self.hq and absolute(self.hq), self.kind)

    def evaluate(
        self,
        restorers: Sequence[Restorer],
        template: Framing,
        devices: tuple[str, str],
        settings: Mapping[str, Any],
    ) -> Evaluation:
        """All that was asked for, checked as far as it can be before the work.

        Args:
            restorers: what is measured.
            template: framing of the faces, where neither the options nor the test set say it.
            devices: where the restorers' networks run, and the metrics'.
            settings: what the results should state.

        Raises:
            LDBFRError: something is not to be had, or does not fit.
        """
        from ldbfr.evaluation.engine import Evaluation

        check_range("--batch-size", self.batch_size, 1, 4096, "16 suits a CPU")
        if self.limit is not None:
            check_range("--limit", self.limit, 1, 10**7, "leave it out for all images")
        test_set = self.test_set()
        framing = test_set.about.get("settings", {}).get("framing") or template
        return Evaluation(
            test_set=test_set,
            restorers=restorers,
            metrics=self.measured.make(framing, devices[1]),
            output=absolute(self.output),
            batch_size=self.batch_size,
            limit=self.limit,
            seed=self.seed,
            settings={**settings, "seed": self.seed, "device": devices[0]},
        )


@dataclass(frozen=True)
class Request(TestSetRequest):
    """What both ways to evaluate take."""

    restorers: tuple[str, ...] = ()
    """What is measured: input, first-stage, names or folders of weights, with options as in
    faces_128@steps=8,scheduler=ddim,start=450 (also condition, color, seed, resize), and NAME=FOLDER with another
    method's PNG files. When left out: input, first-stage and --weights."""
    weights: str = DEFAULT_WEIGHTS
    """Name of weights that come with ldbfr, or a folder of `ldbfr export`."""

    def evaluation(self, command: str, device: str, measuring: str | None = None) -> Evaluation:
        """See `evaluate`.

        Args:
            command: that does it again.
            device: where networks run.
            measuring: where the metrics' networks run, if elsewhere.
        """
        from ldbfr.evaluation.restorers import parse_restorers, read_weights

        named = self.restorers or ("input", "first-stage", self.weights)
        restorers = parse_restorers(named, self.weights, device, self.seed)
        template = read_weights(self.weights)[0].template
        return self.evaluate(restorers, template, (device, measuring or device), {"command": command})


def carry_out(evaluation: Evaluation, execution: Execution) -> tuple[Results, str]:
    """Evaluate, and write the reports; the results and the place of report.html.

    Args:
        evaluation: what is evaluated; the worst images shown are those of the last restorer.
        execution: who does the work.
    """
    from ldbfr.evaluation.gallery import make_gallery
    from ldbfr.evaluation.report import write_reports

    results = evaluation(execution)
    main = evaluation.restorers[-1].name
    rows = evaluation.all_rows()
    gallery = make_gallery(evaluation.test_set, rows, results.measures, evaluation.output, main)
    page, _ = write_reports(evaluation.output, results, gallery)
    return results, page
