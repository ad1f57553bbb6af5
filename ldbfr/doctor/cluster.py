"""What the machines of a cluster say of themselves, compared. The asking is done by jobs/doctor.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ldbfr.doctor.findings import Finding, merged, ok, problem, warning

CLOCK_WARNING_S, CLOCK_PROBLEM_S = 2.0, 300.0
"""S3 refuses requests whose time is 15 minutes off; logs and leases are hard to read long before."""


@dataclass(frozen=True)
class NodeReport:
    """What a machine found out about itself.

    Args:
        findings: of the checks that ran there.
        versions: of what all machines should share.
        gpus: that torch can use.
        gpus_declared: that Ray hands out.
        clock: seconds that its clock is ahead of the driver's.
        uncertainty: of that, in seconds: half the way there and back.
    """

    findings: tuple[Finding, ...]
    versions: Mapping[str, str]
    gpus: int
    gpus_declared: float
    clock: float
    uncertainty: float


def judge_cluster(reports: Mapping[str, NodeReport], silent: Mapping[str, str]) -> list[Finding]:
    """Everything about a cluster.

    Args:
        reports: by machine.
        silent: machines that gave none, and why.
    """
    found = [
        problem(f"node {node}", f"no report: {why}", "look at its logs (/tmp/ray/session_latest/logs), or remove it")
        for node, why in silent.items()
    ]
    if reports:
        found += [*same_versions(reports), *clocks(reports), *gpus(reports)]
        found += merged({node: report.findings for node, report in reports.items()})
    return found


def same_versions(reports: Mapping[str, NodeReport]) -> Iterator[Finding]:
    """Results are the same to the last bit only where the software is."""
    names = dict.fromkeys(name for report in reports.values() for name in report.versions)
    differing = False
    for name in names:
        by_node = {node: report.versions.get(name, "none") for node, report in reports.items()}
        usual, count = Counter(by_node.values()).most_common(1)[0]
        if count < len(reports):
            differing = True
            others = ", ".join(f"{node} has {version}" for node, version in by_node.items() if version != usual)
            what = f"{usual} on {count} of {len(reports)} nodes, but {others}"
            yield problem(f"versions: {name}", what, "give all nodes the same image, or the same constraints.txt")
    if not differing:
        shown = ", ".join(f"{name} {version}" for name, version in next(iter(reports.values())).versions.items())
        yield ok("versions", f"the same on {len(reports)} node(s): {shown}")


def clocks(reports: Mapping[str, NodeReport]) -> Iterator[Finding]:
    """How far the clocks are apart, as far as can be told."""
    advice = "keep time by NTP (chrony, systemd-timesyncd): timedatectl"
    bad = False
    for node, report in reports.items():
        off = max(0.0, abs(report.clock) - report.uncertainty)
        text = f"{report.clock:+.1f} s from the driver's"
        if off > CLOCK_PROBLEM_S:
            yield problem(f"clock, {node}", text, f"{advice}; S3 refuses requests from 15 minutes on")
        elif off > CLOCK_WARNING_S:
            yield warning(f"clock, {node}", text, advice)
        bad = bad or off > CLOCK_WARNING_S
    if not bad:
        most = max(abs(report.clock) for report in reports.values())
        yield ok("clocks", f"within {max(most, 0.01):.2f} s of the driver's")


def gpus(reports: Mapping[str, NodeReport]) -> Iterator[Finding]:
    """Whether Ray and torch agree on how many GPUs there are."""
    total = sum(report.gpus_declared for report in reports.values())
    bad = False
    for node, report in reports.items():
        if report.gpus_declared > report.gpus:
            bad = True
            what = f"Ray hands out {report.gpus_declared:g}, torch can use {report.gpus}"
            yield problem(f"GPUs, {node}", what, "see the GPU's line; ray start --num-gpus says how many Ray hands out")
        elif report.gpus_declared < report.gpus:
            bad = True
            what = f"torch can use {report.gpus}, Ray hands out {report.gpus_declared:g}"
            yield warning(f"GPUs, {node}", what, "start that node with --num-gpus, or leave it out to have them found")
    if not bad:
        yield ok("GPUs", f"{total:g} in the cluster" + ("" if total else ": jobs run on CPUs"))
