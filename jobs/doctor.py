"""Have every machine of a Ray cluster look at itself, and compare them; `python jobs/doctor.py --help` shows how."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import tyro

from jobs.connection import connected, num_cores, prepare_environment, start_log
from ldbfr.config import DEFAULT_WEIGHTS
from ldbfr.doctor.cluster import NodeReport, judge_cluster
from ldbfr.doctor.findings import as_json, as_table, exit_code
from ldbfr.errors import LDBFRError

if TYPE_CHECKING:
    from ldbfr.doctor.findings import Finding

log = logging.getLogger("doctor")

CLOCK_TRIES = 5
EXIT_BAD_REQUEST = 2


@dataclass(frozen=True)
class Doctor:
    """Look at every machine of a Ray cluster, and say of everything that is amiss what to do about it.

    Each does what `ldbfr doctor` does, bucket and weights included, and all are compared: versions, clocks, GPUs.
    A machine that does not answer is a finding too. Exit code 0: no problem. 1: a problem.

    For example:

        ray job submit --working-dir . -- python jobs/doctor.py --storage s3://bucket/runs

        RAY_ADDRESS=10.0.0.1:6379 python jobs/doctor.py
    """

    weights: str = DEFAULT_WEIGHTS
    """Name of weights that come with ldbfr, or a folder that every machine has."""
    storage: tuple[str, ...] = ()
    """Folders or s3://bucket/prefix where runs read and write."""
    read: tuple[str, ...] = ()
    """Folders, archives or s3://bucket/prefix that runs only read."""
    preset: str | None = None
    """Preset that is to be trained; its memory is compared with the GPUs'."""
    patience: float = 120
    """Seconds that a machine has to answer."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the findings as a list of JSON objects."""


def main(arguments: list[str] | None = None) -> int:
    """Run the job; its exit code."""
    start_log()
    request = tyro.cli(Doctor, args=arguments, prog="doctor.py")
    prepare_environment()
    try:
        with connected(num_cores()):
            findings = examine(request)
    except LDBFRError as error:
        print(f"doctor: {error}", file=sys.stderr)
        return EXIT_BAD_REQUEST
    print(as_json(findings) if request.json else as_table(findings), flush=True)
    return exit_code(findings)


def examine(request: Doctor) -> list[Finding]:
    """Ask every machine that is alive."""
    import ray  # takes seconds, which a mistyped option should not cost

    nodes = {name: node for name, node in named(ray.nodes()) if node["Alive"]}
    log.info("%d node(s) look at themselves, within %.0f s", len(nodes), request.patience)
    probes = {name: start_probe(node["NodeID"]) for name, node in nodes.items()}
    asked = {name: probe.look.remote(request) for name, probe in probes.items()}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=request.patience)
    reports: dict[str, NodeReport] = {}
    silent: dict[str, str] = {}
    for name, answer in asked.items():
        try:
            findings, versions, gpus = ray.get(answer, timeout=0.1)
            clock, uncertainty = compare_clocks(probes[name])
        except ray.exceptions.GetTimeoutError:
            silent[name] = f"nothing within {request.patience:.0f} s"
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LDBFRError):
                raise error.cause from error
            silent[name] = str(error).strip().splitlines()[-1]
        except ray.exceptions.RayError as error:
            silent[name] = str(error).strip().splitlines()[0]
        else:
            declared = float(nodes[name]["Resources"].get("GPU", 0))
            reports[name] = NodeReport(tuple(findings), versions, gpus, declared, clock, uncertainty)
    return judge_cluster(reports, silent)


def named(nodes: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Nodes by address; several on one machine are told apart by their ids."""
    for node in nodes:
        alone = sum(other["NodeManagerAddress"] == node["NodeManagerAddress"] for other in nodes if other["Alive"]) < 2
        yield node["NodeManagerAddress"] + ("" if alone else f" ({node['NodeID'][:6]})"), node


class Probe:
    """An actor on one machine; it takes no resources, so that a busy cluster can be looked at too."""

    def look(self, request: Doctor) -> tuple[list[Finding], dict[str, str], int]:
        """The findings, the versions, and how many GPUs torch can use.

        Raises:
            ConfigError: there is no such preset.
        """
        from ldbfr.doctor.command import check_here
        from ldbfr.doctor.machine import gpu_facts
        from ldbfr.doctor.versions import versions

        findings = list(check_here(request.weights, request.storage, request.read, request.preset))
        return findings, versions(), len(gpu_facts().gpus)

    def time(self) -> float:
        """The machine's clock."""
        return time.time()


def start_probe(node: str) -> Any:
    """A probe on a node, and nowhere else."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(Probe).options(num_cpus=0, num_gpus=0, scheduling_strategy=there).remote()


def compare_clocks(probe: Any) -> tuple[float, float]:
    """Seconds that a machine's clock is ahead of ours, and how far that may be wrong; of several tries the surest."""
    import ray

    tries = []
    for _ in range(CLOCK_TRIES):
        before = time.time()
        theirs = ray.get(probe.time.remote(), timeout=30)
        after = time.time()
        tries.append((theirs - (before + after) / 2, (after - before) / 2))
    return min(tries, key=lambda one: one[1])


if __name__ == "__main__":
    sys.exit(main())
