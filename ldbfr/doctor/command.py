"""`ldbfr doctor`: looks at this machine, and at what one names besides."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import tyro

from ldbfr.config import DEFAULT_WEIGHTS
from ldbfr.doctor.addresses import check_cluster, check_server
from ldbfr.doctor.findings import Finding, as_json, as_table, exit_code
from ldbfr.doctor.machine import check_gpus, check_machine
from ldbfr.doctor.models import check_all_models, training_need
from ldbfr.doctor.places import check_place, check_readable
from ldbfr.doctor.versions import check_versions


@dataclass(frozen=True)
class Doctor:
    """Look at this machine, and say of everything that is amiss what to do about it.

    Versions, memory, disks, GPUs, weights and the face detector's file; with --storage what runs do in a bucket, tried
    with an object that is removed again; with --server an endpoint; with --cluster a cluster's job server. The machines
    of a cluster look at themselves by `ray job submit --working-dir . -- python jobs/doctor.py`. Nothing is downloaded,
    nothing is changed.

        ldbfr doctor
        ldbfr doctor --storage s3://bucket/runs --preset paper_512
        ldbfr doctor --server https://faces.example.org --cluster http://127.0.0.1:8265 --json

    Exit code 0: no problem (there may be warnings). 1: a problem.
    """

    weights: str = DEFAULT_WEIGHTS
    """Name of weights that come with ldbfr, or a folder of `ldbfr export`."""
    storage: tuple[str, ...] = ()
    """Folders or s3://bucket/prefix where runs read and write."""
    read: tuple[str, ...] = ()
    """Folders, archives or s3://bucket/prefix that runs only read."""
    preset: str | None = None
    """Preset that is to be trained here; its memory is compared with the GPU's."""
    server: str | None = None
    """Address of an endpoint, such as http://127.0.0.1:8000."""
    cluster: str | None = None
    """Address of a cluster's job server, such as http://127.0.0.1:8265."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the findings as a list of JSON objects."""

    def __call__(self) -> int:
        """Look, print; 1 if there is a problem."""
        findings = list(self.findings())
        print(as_json(findings) if self.json else f"{platform.node()}:\n{as_table(findings)}")
        return exit_code(findings)

    def findings(self) -> Iterator[Finding]:
        """Of everything that was asked for.

        Raises:
            ConfigError: there is no such preset.
        """
        yield from check_here(self.weights, self.storage, self.read, self.preset)
        if self.server is not None:
            yield from check_server(self.server)
        if self.cluster is not None:
            yield from check_cluster(self.cluster)


def check_here(
    weights: str, places: tuple[str, ...], read_only: tuple[str, ...], preset: str | None
) -> Iterator[Finding]:
    """This machine, and what it may do in some places; each machine of a cluster does so too.

    Raises:
        ConfigError: there is no such preset.
    """
    need, what_for = training_need(preset) if preset else (0, "")
    yield from check_versions()
    yield from check_machine()
    yield from check_gpus(need, what_for)
    yield from check_all_models(weights)
    for place in places:
        yield from check_place(place)
    for place in read_only:
        yield from check_readable(place)
