"""Measure restorers on a test set with Ray Data; `python jobs/evaluate.py --help` shows how."""

from __future__ import annotations

import logging
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import tyro

from jobs.connection import num_cores, prepare_environment, start_log
from ldbfr.config import check_range
from ldbfr.errors import ConfigError, LDBFRError
from ldbfr.evaluation.request import Request, carry_out
from ldbfr.lease import Lease
from ldbfr.places import absolute

log = logging.getLogger("evaluate")

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130


@dataclass(frozen=True)
class Evaluate(Request):
    """Measure restorers on a test set as the paper does, on a cluster, and say exactly how.

    The same evaluation as `ldbfr evaluate`, with the same results: the model's actors restore, tasks measure. Test set,
    another method's results and output may be in buckets. The same command goes on where it was stopped, and takes up
    restorers and metrics that are added. See docs/evaluation.md.

    For example:

        python jobs/evaluate.py testsets/val --output evaluations/val

        python jobs/evaluate.py s3://b/celeba-test --output s3://b/evaluations/peers --restorers input faces_128
        CodeFormer=s3://b/codeformer/

        ray job submit --working-dir . -- python jobs/evaluate.py s3://b/celeba-test --output s3://b/ours --workers 8
    """

    workers: int | None = None
    """Copies of the model; they divide the cores. One for each GPU, or else one, when left out."""
    gpus_per_worker: float | None = None
    """Part of a GPU that a worker takes, e.g. 0.25; all GPUs divided by the workers when left out."""
    device: str | None = None
    """"cpu" or "cuda" for the model; GPUs where the cluster has any. Metrics are measured on CPUs."""


def main(arguments: list[str] | None = None) -> int:
    """Run the job; its exit code."""
    start_log()
    request = tyro.cli(Evaluate, args=arguments, prog="evaluate.py")
    command = "python jobs/evaluate.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    try:
        check(request)
        asked = request.evaluation(command, "cpu")
        asked.check(asked.entries())  # what cannot work is refused before Ray starts
        with Lease.acquire(f"{absolute(request.output)}/_lease", f"`{command}`"), ExitStack() as stack:
            return evaluate(request, command, stack)
    except LDBFRError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("evaluate: stopped; what is written is whole, the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED


def check(request: Evaluate) -> None:
    """Refuse what cannot work before anything is started.

    Raises:
        ConfigError: naming the option.
    """
    if request.device is not None and request.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {request.device}: expected cpu or cuda; Ray decides which GPU")
    if request.workers is not None:
        check_range("--workers", request.workers, 1, 10_000, "one per GPU, or one in all on CPUs")
    if request.gpus_per_worker is not None and not 0 < request.gpus_per_worker <= 1:
        raise ConfigError(
            f"--gpus-per-worker {request.gpus_per_worker}: expected above 0, up to 1; 0.5 puts two on one"
        )


def evaluate(request: Evaluate, command: str, stack: ExitStack) -> int:
    """Connect to the cluster, evaluate, and say where the report is."""
    prepare_environment()
    import ray  # these take seconds, which a mistyped option should not cost

    from jobs.evaluate_flow import on_the_cluster
    from jobs.flow import place_workers
    from jobs.restore_flow import cluster
    from ldbfr.evaluation.report_markdown import scores_table

    own = stack.enter_context(cluster(request.workers or 1))
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = request.workers or (gpus if gpus and request.device != "cpu" else 1)
    workers = place_workers(count, request.device, request.batch_size, own, gpus=request.gpus_per_worker)
    log.info("%s; %d cores here", workers, num_cores())
    evaluation = request.evaluation(command, workers.device, measuring="cpu")
    results, page = carry_out(evaluation, on_the_cluster(workers))
    print(scores_table(results, "all"))
    for missing in results.missing:
        print(f"not measured: {missing.name}: {missing.reason}")
    print(page)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
