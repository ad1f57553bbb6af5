"""What the endpoint costs and how it behaves under load, against the bare pipeline on the same machine.

    python benchmarks/endpoint.py load --output benchmarks/results/endpoint.json
    python benchmarks/endpoint.py scaling --output benchmarks/results/endpoint.json
    python benchmarks/endpoint.py load --quick                                          # a minute, to see that it works

`load` measures the pipeline in a bare loop, then the endpoint over HTTP on a Ray of its own: how long it takes from its
command to its first answer, how much it answers when clients ask again at once (closed loop), and how long answers take
when requests come at random times whatever became of those before (open loop, Poisson), from 0.2 to 2 times of that.
`scaling` lets the load come and go, and writes down how many copies of the model there are. Requests are aligned faces
with equal settings; client and endpoint share the cores. The file of results keeps what the other command wrote.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import numpy as np
import psutil
import tyro

from benchmarks.http_load import Connections, Reply, closed_loop, first_event, open_loop, wait_ready
from benchmarks.machine import machine
from jobs.connection import num_cores

REPOSITORY = Path(__file__).resolve().parent.parent
LOADS = (0.2, 0.5, 0.8, 1.0, 1.5, 2.0)
"""Of the capacity."""


@dataclass(frozen=True)
class Load:
    """Throughput, latencies and refusals."""

    data: tuple[Path, ...] = ()
    """Faces: folders, tar or zip files; random pictures when left out, which take as long."""
    weights: str = "faces_64"
    """Which model."""
    batch_size: int = 16
    """Of the bare loop, on all cores, and of the endpoint."""
    replicas: int = 0
    """Copies of the model in the endpoint, which divide the cores; 0: as many as there are cores."""
    steps: int = 8
    """Denoising steps, the same for all: with fewer the model's part of the time is smaller."""
    deadline: float = 10.0
    """Seconds that a request has."""
    seconds: float = 60.0
    """Of each load."""
    bare_images: int = 512
    """That the bare loop restores before, and again after."""
    streams: int = 20
    """One after the other, for the time to the first preview."""
    quick: bool = False
    """Few of everything, to see that it works."""
    output: Path | None = None
    """JSON file for the results."""

    def __call__(self) -> dict[str, Any]:
        """Measure."""
        if self.quick:
            object.__setattr__(self, "seconds", 6.0)
            object.__setattr__(self, "bare_images", 64)
            object.__setattr__(self, "streams", 3)
        images = pictures(self.data, 64)
        before = self.bare(images)
        replicas = self.replicas or num_cores()
        args: dict[str, Any] = {"min_replicas": replicas, "max_replicas": replicas}
        args |= {"threads": max(1, num_cores() // replicas), "deadline_seconds": self.deadline}
        args |= {"weights": self.weights, "batch_faces": self.batch_size}
        with hosted(args | {"max_requests": 1000, "ongoing_per_replica": 256, "max_queued": 256}) as host:
            found = asyncio.run(self.requests(host, images))
        after = self.bare(images)
        loop = (before + after) / 2
        return {
            "weights": self.weights,
            "batch size": self.batch_size,
            "steps": self.steps,
            "copies of the model": replicas,
            "deadline, s": self.deadline,
            "bare loop, images/s": [round(before, 2), round(after, 2)],
            **found,
            "endpoint at saturation / bare loop": round(found["endpoint at saturation, images/s"] / loop, 3),
        }

    def bare(self, images: Sequence[bytes]) -> float:
        """Images/s of the pipeline in a loop, in a process of its own."""
        with tempfile.TemporaryDirectory(prefix="ldbfr-") as folder:
            for number, image in enumerate(images):
                (Path(folder) / f"{number:03d}.jpg").write_bytes(image)
            count, size = str(self.bare_images), str(self.batch_size)
            own = ["bare", "--data", folder, "--weights", self.weights, "--images", count, "--batch-size", size]
            own += ["--steps", str(self.steps)]
            done = subprocess.run([sys.executable, __file__, *own], check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout.strip().splitlines()[-1])["images/s"])

    async def requests(self, host: Host, images: Sequence[bytes]) -> dict[str, Any]:
        """All that is measured over HTTP."""
        path = f"/v1/restorations?mode=aligned&steps={self.steps}"
        stream = path.replace("/v1/restorations", "/v1/restorations/stream")
        connections = Connections(host.port)
        clients = 2 * self.batch_size * (self.replicas or num_cores())  # a batch under way and the next, everywhere
        first = await connections.post(path, images[0])
        assert first.status == 200, first
        answered = time.monotonic()
        previews = [await first_event(host.port, stream, image) for image in islice(cycle(images), self.streams)]
        await closed_loop(connections, path, images, clients, self.seconds / 6)  # the pace is learnt
        full = await closed_loop(connections, path, images, clients, self.seconds)
        capacity = rate(full)
        loads = {}
        for share in (0.5, 2.0) if self.quick else LOADS:
            replies = await open_loop(connections, path, images, share * capacity, self.seconds)
            loads[f"{share:g}"] = about(replies, self.deadline, self.seconds)
            await asyncio.sleep(2)
        connections.close()
        return {
            "from the command to ready, s": round(host.ready - host.started, 1),
            "from the command to the first answer, s": round(answered - host.started, 1),
            "time to the first preview, s, p50 and p95": quantiles(previews, 50, 95),
            "endpoint at saturation, images/s": round(capacity, 2),
            "open loop, by share of that": loads,
        }


@dataclass(frozen=True)
class Bare:
    """The pipeline alone, in a loop over faces in memory."""

    data: Path
    weights: str
    images: int
    batch_size: int
    steps: int

    def __call__(self) -> dict[str, Any]:
        """Measure."""
        import torch

        from ldbfr.images import decode_image, fit_to_side
        from ldbfr.pipeline import LDBFRPipeline

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = LDBFRPipeline.from_pretrained(self.weights, device=device)
        files = sorted(self.data.iterdir())
        own = [fit_to_side(decode_image(file.read_bytes(), name=file.name), pipeline.side) for file in files]
        faces = np.stack(list(islice(cycle(own), self.images)))
        pipeline(faces[: self.batch_size], num_inference_steps=self.steps)
        started = time.perf_counter()
        for start in range(0, len(faces), self.batch_size):
            pipeline(faces[start : start + self.batch_size], num_inference_steps=self.steps)
        return {"images/s": len(faces) / (time.perf_counter() - started)}


@dataclass(frozen=True)
class Scaling:
    """How many copies of the model there are while the load comes and goes."""

    weights: str = "faces_64"
    """Which model."""
    replicas: int = 2
    """At most."""
    quiet: float = 20.0
    """Seconds without load, before."""
    busy: float = 120.0
    """Seconds of load."""
    after: float = 120.0
    """Seconds without load, after."""
    output: Path | None = None
    """JSON file for the results."""

    def __call__(self) -> dict[str, Any]:
        """Measure."""
        args = {"weights": self.weights, "max_replicas": self.replicas, "upscale_delay_seconds": 10}
        with hosted(args | {"downscale_delay_seconds": 30, "threads": 1}) as host:
            return asyncio.run(self.requests(host))

    async def requests(self, host: Host) -> dict[str, Any]:
        """The load, and what it does."""
        connections, images, path = Connections(host.port), pictures((), 64), "/v1/restorations?mode=aligned"
        begun = time.monotonic()
        trace: list[tuple[float, int]] = []

        async def look() -> None:
            while True:
                count = host.replicas()
                if not trace or trace[-1][1] != count:
                    trace.append((round(time.monotonic() - begun, 1), count))
                await asyncio.sleep(0.5)

        looking = asyncio.create_task(look())
        await asyncio.sleep(self.quiet)
        replies = await closed_loop(connections, path, images, 24 * self.replicas, self.busy)
        await asyncio.sleep(self.after)
        looking.cancel()
        connections.close()
        return {
            "load from and to, s": [self.quiet, self.quiet + self.busy],
            "processes of the model, from second": [list(entry) for entry in trace],
            "answers": dict(Counter(str(reply.status) for reply in replies)),
            "images/s in the first and the last quarter of the load": [
                round(rate(part), 2) for part in (replies[: len(replies) // 4], replies[-(len(replies) // 4) :])
            ],
        }


@dataclass(frozen=True)
class Hosting:
    """The endpoint on a Ray of its own, until its standard input ends."""

    port: int
    args: str

    def __call__(self) -> None:
        """Deploy, and wait."""
        from jobs.connection import connected, prepare_environment

        prepare_environment()
        args = json.loads(self.args)
        with connected(num_cores() + args.get("max_replicas", 1)):
            from ray import serve as ray_serve

            from serve.app import build_app

            ray_serve.start(http_options={"port": self.port})
            ray_serve.run(build_app(args), name="ldbfr", route_prefix="/")
            sys.stdin.read()
            ray_serve.shutdown()


@dataclass(frozen=True)
class Host:
    """A running endpoint."""

    process: subprocess.Popen[bytes]
    port: int
    started: float
    ready: float

    def replicas(self) -> int:
        """Processes of the model."""
        titles = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                titles.append(" ".join(child.cmdline()))
            except psutil.Error:
                continue
        return sum(title.startswith("ray::ServeReplica") and ":FaceModel" in title for title in titles)


@contextmanager
def hosted(args: dict[str, Any]) -> Iterator[Host]:
    """An endpoint of these settings, in processes of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    command = [sys.executable, __file__, "hosting", "--port", str(port), "--args", json.dumps(args)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        wait_ready(port, process)
        yield Host(process, port, started, time.monotonic())
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait(30)


# ---- figures ----


def rate(replies: Sequence[Reply]) -> float:
    """Images/s between the first and the last answer.

    Raises:
        RuntimeError: there are not enough for that.
    """
    ends = sorted(reply.ended for reply in replies if reply.status == 200)
    if len(ends) < 2:
        answers = dict(Counter(reply.status for reply in replies))
        raise RuntimeError(f"only {len(ends)} images were restored (answers by status: {answers}); raise --deadline")
    return (len(ends) - 1) / (ends[-1] - ends[0])


def quantiles(values: Sequence[float], *which: float) -> list[float]:
    """Percentiles, in seconds."""
    return [round(float(value), 3) for value in np.percentile(values, which)] if len(values) else []


def about(replies: Sequence[Reply], deadline: float, seconds: float) -> dict[str, Any]:
    """What became of the requests of a load; times are from when they were to be sent."""
    accepted = [reply.ended - reply.due for reply in replies if reply.status == 200]
    refused = [reply.ended - reply.due for reply in replies if reply.status in (429, 503)]
    return {
        "requests": len(replies),
        "requests/s": round(len(replies) / seconds, 2),
        "answers": dict(Counter(str(reply.status) for reply in replies)),
        "accepted: p50, p95, p99, s": quantiles(accepted, 50, 95, 99),
        "accepted, but after the deadline": sum(value > deadline for value in accepted),
        "refused: share": round(len(refused) / len(replies), 3),
        "refused without Retry-After": sum(
            reply.status in (429, 503) and reply.retry_after is None for reply in replies
        ),
        "refused: p50, p95, s": quantiles(refused, 50, 95),
        "without an answer": sum(reply.status == 0 for reply in replies),
    }


def pictures(data: tuple[Path, ...], count: int) -> list[bytes]:
    """JPEG files of faces, or of random colours."""
    if data:
        from ldbfr.data.index import iterate_images

        faces = [face for source in data for _, face in iterate_images(source)]
        return list(islice(cycle(faces), count))
    from ldbfr.images import encode_image, resize

    rng = np.random.default_rng(0)
    return [
        encode_image(resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), 96, 96), "jpeg", quality=90)
        for _ in range(count)
    ]


def main(chosen: Load | Scaling | Bare | Hosting) -> None:
    """Measure, print, and write beside what is there."""
    if isinstance(chosen, Hosting):
        return chosen()
    if isinstance(chosen, Bare):
        print(json.dumps(chosen()))
        return None
    name = type(chosen).__name__.lower()
    results = {"command": " ".join(["python", "benchmarks/endpoint.py", *sys.argv[1:]]), "machine": machine()}
    results |= chosen()
    print(json.dumps(results, indent=1))
    if chosen.output is not None:
        there = json.loads(chosen.output.read_text("utf-8")) if chosen.output.exists() else {}
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(there | {name: results}, indent=1) + "\n", "utf-8")
    return None


if __name__ == "__main__":
    Commands = (
        Annotated[Load, tyro.conf.subcommand("load", prefix_name=False)]
        | Annotated[Scaling, tyro.conf.subcommand("scaling", prefix_name=False)]
        | Annotated[Bare, tyro.conf.subcommand("bare", prefix_name=False)]
        | Annotated[Hosting, tyro.conf.subcommand("hosting", prefix_name=False)]
    )
    main(tyro.cli(Commands, description=__doc__))
