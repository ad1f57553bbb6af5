"""`ldbfr ablations` and `ldbfr step-budget`: experiments that end in one report."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ldbfr.cli.evaluate import on_this_machine, prepare_torch
from ldbfr.config import DEFAULT_WEIGHTS, SchedulerName, check_range, load_preset
from ldbfr.errors import ConfigError
from ldbfr.evaluation.request import TestSetRequest
from ldbfr.places import absolute

if TYPE_CHECKING:
    from ldbfr.config import Preset


@contextmanager
def signals_kept() -> Iterator[None]:
    """Whoever hears Ctrl-C and termination within it, afterwards it is as before."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Ablations(TestSetRequest):
    """Train and evaluate the paper's comparisons: same seeds, same data, same steps; one table and pictures of each.

    Of the preset seven variants are trained: the full model, DCAM without one half, the other, or both, and the
    injections A, B and C of figure 9. Autoencoders and prior are trained once and shared, and the injections' variants
    share the first stage. --scale takes a share of every stage's steps. The same command goes on where it was stopped.

        ldbfr ablations testsets/val-64 --data faces/ --output ablations/first --preset faces_64 --scale 0.1
        ldbfr ablations testsets/val --data faces/ --output ablations/base --base runs/reference --compare injections
    """

    data: tuple[str, ...] = ()
    """Aligned faces to train on, as for `ldbfr train`."""
    preset: str = "faces_64"
    """Name of a preset, or a .toml file."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """Override a setting of all variants, e.g. --set training.prior.steps=200; may be given several times."""
    scale: float = 1.0
    """Share of every stage's steps that is trained, of --preset alone or with --set."""
    base: Path | None = None
    """A run whose hq_vqgan, latent_vqgan and prior are taken; its preset is the study's then."""
    init: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """STAGE=FOLDER: a network that a stage of the full model starts from, as for `ldbfr train`."""
    compare: tuple[Literal["dcam", "diffusion", "injections"], ...] = ("dcam", "diffusion", "injections")
    """Which comparisons."""
    device: str | None = None
    """"cpu", "cuda" or "mps"; the GPU when there is one."""
    threads: int | None = None
    """CPU threads for torch; all cores when left out."""
    processes: int | None = None
    """That measure; one for every core when left out."""

    def __call__(self) -> int:
        """Train what is not trained, evaluate, and say where the report is; 130 when stopped."""
        preset = self.resolved()
        device = prepare_torch(self.device, self.threads)

        from ldbfr.data.shards import open_faces
        from ldbfr.evaluation.report_markdown import scores_table
        from ldbfr.lease import Lease
        from ldbfr.studies.ablations import Training, compare, restorers_of, settings_of
        from ldbfr.studies.variants import chosen_variants
        from ldbfr.training.run import parse_init
        from ldbfr.training.runtime import SingleProcess

        self.check_side(preset.side)  # which should not wait for a training
        images = open_faces(self.data, preset.side, "train")
        training = Training(preset, images, Path(absolute(self.output)), self.base, parse_init(self.init))
        training.check()
        variants = chosen_variants(self.compare)
        command = f"ldbfr {shlex.join(sys.argv[1:])}"
        with Lease.acquire(f"{absolute(self.output)}/_lease", f"`{command}`") as lease:
            with signals_kept():  # a training asks for a checkpoint at Ctrl-C, what comes after it just ends
                runtime = SingleProcess(device)
                runtime.check = lease.check
                if not training.train(variants, runtime):
                    return 130
            settings = {"command": command, **settings_of(training, variants)}
            restorers = restorers_of(training, variants, device, self.seed)
            evaluation = self.evaluate(restorers, preset.template, (device, device), settings)
            results, page = compare(evaluation, self.compare, on_this_machine(self.processes))
        print(scores_table(results, "all"))
        print(page)
        return 0

    def check_side(self, side: int) -> None:
        """Refuse a test set of another side than the preset's.

        Raises:
            LDBFRError: naming both sides, or why the test set cannot be read.
        """
        test_set = self.test_set()
        found = test_set.read(test_set.entries[0])[0].shape[0]
        if found != side:
            raise ConfigError(
                f"{self.testset} has faces of {found} px, the preset trains for {side} px: make a test set with "
                f"`ldbfr testset --side {side}`"
            )

    def resolved(self) -> Preset:
        """The preset of the full model.

        Raises:
            ConfigError: an option does not fit another.
        """
        if not self.data:
            raise ConfigError("--data: nothing given, expected aligned faces to train on, as for `ldbfr train`")
        if "://" in self.output:
            raise ConfigError(f"--output {self.output}: variants share stages by links; name a folder of this machine")
        if not self.compare:
            raise ConfigError("--compare: nothing given, expected some of dcam, diffusion, injections")
        if not 0 < self.scale <= 100:
            raise ConfigError(f"--scale {self.scale}: expected above 0, up to 100; 0.1 takes a tenth of the steps")

        from ldbfr.studies.variants import SHARED, scaled

        preset = load_preset(self.preset, self.set)
        if self.base is None:
            return scaled(preset, self.scale)

        from ldbfr.training.export import read_run_preset

        if self.set or self.preset != "faces_64":
            raise ConfigError("--preset and --set do not go with --base, whose run has its own preset; leave them out")
        own = read_run_preset(self.base)
        stages = {name: getattr(own.training, name) for name in SHARED}
        fewer = scaled(own, self.scale)
        return fewer.model_copy(update={"training": fewer.training.model_copy(update=stages)})


@dataclass(frozen=True)
class StepBudget(TestSetRequest):
    """Quality against the number of steps and the scheduler, with the time of an image; and the default that follows.

    The grid is restored and measured as by `ldbfr evaluate`, drawn as curves, and the fewest steps are picked that
    miss the best by no more than a margin, with the reason. The same command goes on where it was stopped.

        ldbfr step-budget testsets/val --output evaluations/steps --limit 50
        ldbfr step-budget testsets/val --output evaluations/ddpm --schedulers ddpm --steps 16 50 200
    """

    weights: str = DEFAULT_WEIGHTS
    """Name of weights that come with ldbfr, or a folder of `ldbfr export`."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50)
    """Numbers of denoising steps."""
    schedulers: tuple[SchedulerName, ...] = ("dpm_solver", "ddim", "ddpm", "unipc")
    """Samplers."""
    start_step: int | None = None
    """Where the diffusion starts; the weights' own when left out."""
    device: str | None = None
    """"cpu", "cuda" or "mps"; the GPU when there is one."""
    threads: int | None = None
    """CPU threads for torch; all cores when left out."""
    processes: int | None = None
    """That measure; one for every core when left out."""

    def __call__(self) -> int:
        """Measure, and print the default that follows, and where the report is."""
        if not self.steps or not self.schedulers:
            raise ConfigError("--steps and --schedulers: expected at least one of each")
        for count in self.steps:
            check_range("--steps", count, 1, 1000, "the first stage alone is measured anyway")
        device = prepare_torch(self.device, self.threads)

        from ldbfr.evaluation.report_markdown import scores_table
        from ldbfr.evaluation.restorers import read_weights
        from ldbfr.lease import Lease
        from ldbfr.studies.step_budget import restorers_of, study

        command = f"ldbfr {shlex.join(sys.argv[1:])}"
        options = {"start_step": self.start_step, "seed": self.seed}
        restorers = restorers_of(self.weights, self.steps, self.schedulers, device, **options)
        template = read_weights(self.weights)[0].template
        evaluation = self.evaluate(restorers, template, (device, device), {"command": command})
        evaluation.check(evaluation.entries())  # before anything is written
        with Lease.acquire(f"{absolute(self.output)}/_lease", f"`{command}`"):
            results, choice, page = study(evaluation, self.steps, self.schedulers, on_this_machine(self.processes))
        print(scores_table(results, "all"))
        print("no default follows: nothing was measured that judges" if choice is None else choice.reason)
        print(page)
        return 0
