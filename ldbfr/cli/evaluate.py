"""`ldbfr evaluate`: measure restorers on a test set, on this machine."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldbfr.config import check_range
from ldbfr.evaluation.request import Request, carry_out
from ldbfr.places import absolute

if TYPE_CHECKING:
    from ldbfr.evaluation.engine import Execution


@dataclass(frozen=True)
class Evaluate(Request):
    """Measure restorers on a test set as the paper does, and say exactly how; `jobs/evaluate.py` does it on a cluster.

    A restorer is weights with any sampling, their first stage alone, another method's results, or the input itself.
    Test sets come from `ldbfr testset`; their images must have the side that the weights restore. The same command goes
    on where it was stopped, and takes up restorers and metrics that are added. See docs/evaluation.md.

        ldbfr evaluate testsets/val --output evaluations/val
        ldbfr evaluate testsets/val --output evaluations/steps --restorers faces_128@steps=2 faces_128@steps=8
        ldbfr evaluate testsets/celeba --output evaluations/peers --restorers input faces_128 CodeFormer=results/cf/
        ldbfr evaluate lfw/cropped_faces --kind lfw --output evaluations/lfw --metrics fid-reference --reference ffhq/
    """

    device: str | None = None
    """"cpu", "cuda" or "mps"; the GPU when there is one."""
    threads: int | None = None
    """CPU threads for torch; all cores when left out."""
    processes: int | None = None
    """That measure; one for every core when left out."""

    def __call__(self) -> int:
        """Measure, and say where the report is."""
        from ldbfr.evaluation.report_markdown import scores_table
        from ldbfr.lease import Lease

        execution = on_this_machine(self.processes)
        command = f"ldbfr {shlex.join(sys.argv[1:])}"
        evaluation = self.evaluation(command, prepare_torch(self.device, self.threads))
        evaluation.check(evaluation.entries())  # before anything is written
        with Lease.acquire(f"{absolute(self.output)}/_lease", f"`{command}`"):
            results, page = carry_out(evaluation, execution)
        print(scores_table(results, "all"))
        for missing in results.missing:
            print(f"not measured: {missing.name}: {missing.reason}")
        print(page)
        return 0


def prepare_torch(device: str | None, threads: int | None) -> str:
    """Set the number of threads, and choose the device where none was given."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def on_this_machine(processes: int | None) -> Execution:
    """The networks in this process, the metrics in as many as were asked for."""
    from ldbfr.evaluation import engine
    from ldbfr.evaluation.measuring import num_cores

    count = num_cores() if processes is None else processes
    check_range("--processes", count, 1, 1024, "one for every core is the default")
    return engine.on_this_machine(count)
