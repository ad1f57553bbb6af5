"""An evaluation on Ray Data: the model's actors restore batches, tasks measure them, and a task measures each set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from jobs.flow import RayRunner, Stage, Workers, each_item, flow, num_cpus
from ldbfr.evaluation.engine import Execution
from ldbfr.evaluation.work import Batch, MeasureStep, RestoreStep


def on_the_cluster(workers: Workers) -> Execution:
    """Everything on the cluster; a batch of images is what travels at a time, and it is read and written there."""
    return Execution(RestoreOnCluster(workers), MeasureOnCluster(), RayRunner(num_cpus()))


@dataclass(frozen=True)
class RestoreOnCluster:
    """Restores batches: weights in actors that load them once, what needs none in tasks."""

    workers: Workers

    def __call__(self, step: RestoreStep, batches: Sequence[Batch]) -> Iterator[int]:
        """The numbers of the batches, as they are done.

        Raises:
            LDBFRError: a worker cannot start, or a batch cannot be restored.
        """
        if not step.restorer.is_timed:
            yield from RayRunner(num_cpus())(step, batches)
            return
        workers = self.workers
        yield from flow(
            batches,
            Stage(
                StepActor,
                {
                    "fn_constructor_args": (step, workers.threads),
                    "compute": workers.pool(len(batches)),
                    "num_cpus": workers.threads,
                    "num_gpus": workers.gpus,
                },
            ),
        )


class StepActor:
    """An actor that restores batches; its restorer loads the weights at the first.

    Args:
        step: what is done.
        threads: of the CPU, for torch.
    """

    def __init__(self, step: RestoreStep, threads: int) -> None:
        import torch  # here, because what measures imports this file too, and would wait seconds for it

        torch.set_num_threads(threads)
        self.step = step

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Restore one batch."""
        yield from each_item(table, self.step)


@dataclass(frozen=True)
class MeasureOnCluster:
    """Measures batches in tasks of one CPU each."""

    def __call__(self, step: MeasureStep, batches: Sequence[Batch]) -> Iterator[int]:
        """The numbers of the batches, as they are measured."""
        yield from RayRunner(num_cpus())(step, batches)
