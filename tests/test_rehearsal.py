"""A rehearsal with several machines: a training and an archive share a cluster, one machine vanishes, both finish."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldbfr import storage
from ldbfr.training.run import done_steps
from tests import archiving
from tests.archiving import manifest, outputs, png, put_files
from tests.hosts import Driver, Hosts, namespaces, ray_nodes, start, until, which, why_no_namespaces
from tests.prepared import write_set

SECONDS = 600
STAGE, STEPS, EVERY = "latent_vqgan", 900, 25
IMAGES, UNIT = 160, 4
BUCKET = "s3://rehearsal"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three machines with an address of their own each, or what comes closest here."""
    reason = why_no_namespaces()
    with ray_nodes() if reason else namespaces() as made:
        yield made


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.timeout(2400)
def test_a_training_and_an_archive_outlive_a_machine(
    hosts: Hosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := why_no_namespaces():
        with capsys.disabled():
            print(f"\nno network namespaces ({reason}): a killed node of ray.cluster_utils stands for a lost machine")
    boto3 = pytest.importorskip("boto3")
    weights = archiving.save_weights(tmp_path / "weights")
    files = {f"{number % 3}/{number:03d}.png": png(number) for number in range(IMAGES)}
    with hosts.on_head():
        boto3.client("s3").create_bucket(Bucket=BUCKET.removeprefix("s3://"))
        write_set(f"{BUCKET}/faces", {"train": 6, "val": 2})
        put_files(f"{BUCKET}/in", files)

    training = start(hosts, train_command(), tmp_path / "training.log")
    drivers = [training]
    try:
        until(lambda: len(working(hosts)) == 2, SECONDS, training)
        archive = start(hosts, restore_command(weights), tmp_path / "archive.log")
        drivers.append(archive)
        until(lambda: restored(hosts) >= 3 * UNIT and trained(hosts) >= EVERY, SECONDS, training, archive)
        busy = working(hosts)
        assert len(busy) == 2, f"workers on {busy}: {training.text()}"
        assert f"{STAGE} runs on 2 worker(s)" in training.text()
        assert trained(hosts) < STEPS, "the training was too fast to be disturbed"
        assert restored(hosts) < IMAGES, "the archive was too fast to be disturbed"

        hosts.cut_off(busy[-1])

        told = archive.finish(SECONDS)
        trained_so = training.finish(SECONDS)
    finally:
        end(drivers)
    assert "going on from the last checkpoint" in trained_so
    assert f"{STAGE} {STEPS}/{STEPS}" in trained_so
    assert f"{IMAGES} of {IMAGES} images restored, 0 failed" in told
    with hosts.on_head():
        rows = manifest(f"{BUCKET}/out")
        assert {key: row.status for key, row in rows.items()} == dict.fromkeys(files, "restored")
        assert set(outputs(f"{BUCKET}/out")) == set(files)
        assert done_steps(f"{BUCKET}/run", STAGE) == STEPS


def train_command() -> list[str]:
    """Two workers, or one when there is room for no more."""
    settings = {"steps": STEPS, "checkpoint_every": EVERY, "log_every": 20}
    overrides = [item for name, value in settings.items() for item in ("--set", f"training.{STAGE}.{name}={value}")]
    command = ["train.py", "--preset", "tiny", "--stage", STAGE, "--workers", "1:2", "--cpus-per-worker", "2"]
    return [*command, "--data", f"{BUCKET}/faces", "--run", f"{BUCKET}/run", "--no-validate", *overrides]


def restore_command(weights: str) -> list[str]:
    """One model, and small units, so that a lost machine takes some along."""
    command = ["restore.py", "--input", f"{BUCKET}/in", "--output", f"{BUCKET}/out", "--weights", weights]
    return [*command, "--workers", "1", "--shard-images", str(UNIT), "--batch-size", str(UNIT), "--steps", "4"]


def working(hosts: Hosts) -> list[int]:
    """The machines on which the training has a worker."""
    return which(hosts, range(3), "RayTrainWorker")


def trained(hosts: Hosts) -> int:
    """Steps of the newest checkpoint."""
    with hosts.on_head():
        return done_steps(f"{BUCKET}/run", STAGE)


def restored(hosts: Hosts) -> int:
    """Images in the output."""
    with hosts.on_head():
        return sum(bool(re.match(r"[0-2]/", found.key)) for found in storage.list_objects(f"{BUCKET}/out"))


def end(drivers: list[Driver]) -> None:
    """What is still at work after a failure."""
    for driver in drivers:
        if driver.process.poll() is None:
            driver.kill()
