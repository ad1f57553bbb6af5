"""The endpoint on a local Ray, over HTTP: the bytes are those without Ray; kills, redeploys, an hour of load."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import yaml

from ldbfr.errors import ConfigError, WeightsError
from ldbfr.faces import DETECTOR_FILE
from ldbfr.images import decode_image, encode_image
from ldbfr.pipeline import LDBFRPipeline
from serve.deployment import DeploymentSettings
from serve.model import LocalFaceModel
from serve.model_info import describe
from serve.protocol import DeadlineExceeded, RestorationOptions, Restored
from serve.replicas import Due, FaceModelReplica, RayFaceModel
from serve.restoring import PhotoService
from tests import tiny
from tests.conftest import REPOSITORY
from tests.serve_load import Answer, Client, replicas, wait_for
from tests.test_serve_restoring import INFO, Slow, collected, job, local

pytest.importorskip("ray.serve")
ray_test = pytest.mark.ray

IMAGES = [encode_image(tiny.blob_faces(1, side=48, seed=seed)[0], "png") for seed in range(8)]
ARGS = {"deadline_seconds": 60, "health_check_seconds": 2, "threads": 1, "batch_faces": 4, "ongoing_per_replica": 8}


def new_weights(folder: Path, seed: int) -> Path:
    tiny.new_pipeline(seed=seed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny pipeline."""
    return new_weights(tmp_path_factory.mktemp("weights") / "tiny", 0)


@pytest.fixture(scope="module")
def client(ray_cluster: None) -> Iterator[Client]:
    """Ray Serve on a free port, with nothing deployed yet."""
    from ray import serve as ray_serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    patch = pytest.MonkeyPatch()
    patch.setenv(DETECTOR_FILE.variable, "/nowhere/detector.onnx")  # most tests are of aligned faces
    ray_serve.start(http_options={"port": port})
    yield Client(port)
    ray_serve.shutdown()
    patch.undo()


def deploy(weights: Path, **args: Any) -> None:
    """Deploy, and wait until it is there."""
    from ray import serve as ray_serve

    from serve.app import build_app

    ray_serve.run(build_app({"weights": str(weights), **ARGS, **args}), name="ldbfr", route_prefix="/")


@pytest.fixture(scope="module")
def endpoint(client: Client, weights: Path) -> Client:
    """The application, deployed."""
    deploy(weights)
    client.wait_ready()
    return client


def alone(weights: Path, image: bytes, **options: Any) -> Restored:
    """What the service gives without Ray and HTTP."""
    pipeline: LDBFRPipeline = LDBFRPipeline.from_pretrained(weights)
    model = LocalFaceModel(pipeline, describe(pipeline.preset, pipeline.weights_digest, str(weights)))
    asked = RestorationOptions(mode="aligned", **options)
    return asyncio.run(PhotoService(model).restore(image, asked, time.monotonic() + 60))


# ---- settings, without a cluster ----


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"weihgts": "faces_64"}, "weihgts: there is no such setting"),
        ({"max_replicas": "many"}, "max_replicas 'many'"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is above max_replicas 2"),
        ({"device": "cuda"}, "device cuda with gpus_per_replica 0"),
        ({"device": "cpu", "gpus_per_replica": 1}, "gpus_per_replica 1 with device cpu"),
        ({"gpus_per_replica": 1.5}, r"gpus_per_replica 1\.5: above 1"),
        ({"cpus_per_replica": "inf"}, "cpus_per_replica inf: expected a finite number"),
        ({"ongoing_per_replica": 4}, "ongoing_per_replica 4 is below batch_faces 16"),
        ({"host": "0.0.0.0"}, "keys_file"),
        ({"job_workers": "all"}, "job_workers 'all'"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_start(args: dict[str, Any], text: str) -> None:
    from serve.app import build_app

    with pytest.raises(ConfigError, match=text):
        build_app(args)


def test_weights_that_are_not_there_are_refused_at_start() -> None:
    from serve.app import build_app

    with pytest.raises(WeightsError, match="no weights 'faces_65'"):
        build_app({"weights": "faces_65"})


def test_no_keys_are_fine_on_this_machine_only() -> None:
    from serve.app import check_address

    settings = DeploymentSettings()
    check_address("127.0.0.1", settings)
    for host in ("0.0.0.0", "192.168.1.5", "::"):
        with pytest.raises(ConfigError, match=r"which other machines can reach, and there are no API keys"):
            check_address(host, settings)


def test_the_example_configuration_is_one_that_ray_and_we_accept() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = (REPOSITORY / "serve" / "config.yaml").read_text("utf-8")
    config = yaml.safe_load(text)
    schema = ServeDeploySchema.model_validate(config)
    assert set(config) <= set(ServeDeploySchema.model_fields), "Ray would pass over a key that it does not know"
    (application,) = config["applications"]
    assert application["import_path"] == "serve.app:build_app"
    assert schema.http_options.host == "127.0.0.1"
    settings = DeploymentSettings.from_args(application["args"])
    assert schema.http_options.request_timeout_s is not None
    assert schema.http_options.request_timeout_s > settings.deadline_seconds + settings.upload_seconds
    for name in application["args"]:
        assert f"\n      {name}:" in text


def test_one_replica_has_all_cores_and_several_share_them() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert DeploymentSettings().torch_threads == cores
    assert DeploymentSettings(max_replicas=2, cpus_per_replica=3).torch_threads == 3
    assert DeploymentSettings(threads=5).torch_threads == 5


def test_archive_jobs_take_the_endpoints_weights() -> None:
    import tyro

    from jobs.restore import Restore
    from serve.app import job_options

    assert job_options(DeploymentSettings(weights="/w")) == ("--weights", "/w")
    assert job_options(DeploymentSettings(weights="/w", job_workers="1:4")) == ("--weights", "/w", "--workers", "1:4")
    own = job_options(DeploymentSettings(weights="/w", detector="/d.onnx"))
    assert own == ("--weights", "/w", "--detector", "/d.onnx")
    parsed = tyro.cli(Restore, args=["--input", "s3://bucket/in", "--output", "s3://bucket/out", *own])
    assert (parsed.weights, parsed.detector) == ("/w", "/d.onnx")


def test_a_request_without_steps_is_within_the_limit_too(weights: Path) -> None:
    from serve.app import build_app

    steps = tiny.preset().sampling.num_inference_steps
    build_app({"weights": str(weights), "max_steps": steps})
    with pytest.raises(ConfigError, match=f"max_steps {steps - 1}: the weights .*tiny take {steps} steps"):
        build_app({"weights": str(weights), "max_steps": steps - 1})


def test_a_replica_that_ends_has_time_for_the_longest_request() -> None:
    """The ingress has it from the first byte of its body on."""
    from serve.app import SPARE_SECONDS, endpoint, face_model

    settings = DeploymentSettings(upload_seconds=20, deadline_seconds=40)
    for deployment, longest in ((endpoint(settings), 60), (face_model(settings), 40)):
        assert deployment._deployment_config.graceful_shutdown_timeout_s == longest + SPARE_SECONDS


def test_a_deadline_means_the_same_elsewhere() -> None:
    due = Due.of(time.monotonic() + 10)
    assert due.here() == pytest.approx(time.monotonic() + 10, abs=0.1)
    assert due._replace(then=due.then - 4).here() == pytest.approx(time.monotonic() + 6, abs=0.1)
    assert due._replace(then=due.then + 4).here() == pytest.approx(time.monotonic() + 10, abs=0.1)


def handle_of(**methods: Any) -> Any:
    """The handle of a deployment whose replica, on another machine, has these methods."""

    def method_of(method: Any) -> Any:
        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(method(*arguments)))

    return SimpleNamespace(**{name: method_of(method) for name, method in methods.items()})


def test_a_copy_that_takes_too_long_says_so_itself() -> None:
    """As nobody else had an answer either, the ingress would take it for dead, and have the client ask again."""

    async def late() -> None:
        replica: Any = SimpleNamespace(model=local(Slow(between)))
        model = RayFaceModel(handle_of(restore=partial(FaceModelReplica.restore, replica)))
        try:
            with pytest.raises(DeadlineExceeded):
                await model.restore(job(), time.monotonic() + 1.5)
        finally:
            go_on.set()

    def between(step: int) -> None:
        go_on.wait(10)

    go_on = threading.Event()
    asyncio.run(late())


def test_a_full_queue_is_a_sign_of_life_and_one_asks_for_all() -> None:
    from ray.serve.exceptions import BackPressureError

    asked = 0

    async def info() -> Any:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        if asked > 1:
            raise BackPressureError(num_queued_requests=1, max_queued_requests=1)
        return INFO

    async def busy() -> None:
        model = RayFaceModel(handle_of(info=info))
        assert await asyncio.gather(*(model.info() for _ in range(5))) == [INFO] * 5
        assert asked == 1
        model.heard -= 60
        assert await PhotoService(model).ready()
        assert asked == 2
        model.known, model.heard = None, model.heard - 60
        assert not await PhotoService(model).ready(), "what it is, nobody knows"

    asyncio.run(busy())


def test_a_replica_with_a_broken_device_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tells those who wait, who go to another one; to answer everything by 503 would draw them here."""
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemError  # nothing goes on after the real one

    def broken(step: int) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    async def tried() -> None:
        calls: tuple[Callable[[Any, Due], Awaitable[Any]], ...] = (
            lambda replica, due: FaceModelReplica.restore(replica, job(), due),
            lambda replica, due: collected(FaceModelReplica.stream(replica, job(), due)),
            lambda replica, due: FaceModelReplica.check_health(replica),
        )
        for call in calls:
            replica = SimpleNamespace(model=local(Slow(broken)), period=10)
            with pytest.raises(SystemError):
                await call(replica, Due.of(time.monotonic() + 60))

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    asyncio.run(tried())
    assert ended == [1, 1, 1]


# ---- over HTTP ----


@ray_test
@pytest.mark.timeout(180)
def test_the_same_bytes_as_without_ray(endpoint: Client, weights: Path) -> None:
    for number, options in enumerate([{"steps": 2}, {"steps": 0}, {"steps": 3, "seed": 9, "format": "jpeg"}]):
        answer = endpoint.restore(IMAGES[number], mode="aligned", **options)
        expected = alone(weights, IMAGES[number], **options)
        assert answer.status == 200, answer
        assert answer.body == expected.image
        assert answer.headers["x-weights-digest"] == expected.weights_digest
        assert answer.headers["content-type"] == f"image/{expected.format}"
        assert {part.split(";")[0].strip() for part in answer.headers["server-timing"].split(",")} >= {"queue", "model"}
        assert len(answer.headers["x-request-id"].split(",")) == 1


@ray_test
def test_the_ingress_does_without_torch(endpoint: Client) -> None:
    """Which would take a gigabyte of each."""
    (ingress,) = replicas("Endpoint")
    (model,) = replicas("FaceModel")
    has_torch = [any("libtorch" in area.path for area in one.memory_maps()) for one in (ingress, model)]
    assert has_torch == [False, True]


@ray_test
def test_every_request_has_a_line_in_the_log_of_the_ingress(endpoint: Client) -> None:
    (ingress,) = replicas("Endpoint")
    log = Path(f"/proc/{ingress.pid}/fd/2")  # a file that Ray keeps
    headers = {"Content-Type": "application/octet-stream", "X-Request-Id": "seen-again"}
    assert endpoint.ask("POST", "/v1/restorations?mode=aligned&steps=0", IMAGES[0], headers).status == 200
    wait_for(lambda: "seen-again" in log.read_text("utf-8"))
    line = json.loads(next(line for line in log.read_text("utf-8").splitlines() if "seen-again" in line))
    assert (line["logger"], line["route"], line["status"]) == ("serve.requests", "/v1/restorations", 200)


@ray_test
def test_a_stream_ends_with_the_same_image(endpoint: Client, weights: Path) -> None:
    answer = endpoint.restore(IMAGES[0], "/v1/restorations/stream", mode="aligned", steps=4)
    assert answer.status == 200
    events = [block.split("\n", 1) for block in answer.body.decode().strip().split("\n\n") if block.startswith("event")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names == ["preview"] * (len(names) - 1) + ["result"]
    assert len(names) >= 2
    first, last = (json.loads(events[place][1].removeprefix("data: ")) for place in (0, -1))
    assert (first["step"], first["steps"]) == (0, 4)
    assert decode_image(base64.b64decode(first["image"]), name="preview").shape == (32, 32, 3)
    assert base64.b64decode(last["image"]) == alone(weights, IMAGES[0], steps=4).image


@ray_test
def test_what_is_wrong_comes_as_a_problem(endpoint: Client) -> None:
    wrong = {
        "bad-image": endpoint.restore(b"no image at all", mode="aligned"),
        "bad-options": endpoint.restore(IMAGES[0], mode="aligned", samples=2, steps=0),
    }
    for slug, answer in wrong.items():
        assert (answer.status, answer.json["type"]) == (422, f"/problems/{slug}"), answer
    without_detector = endpoint.restore(IMAGES[0], mode="photo")
    assert without_detector.status == 422
    assert "ask for mode aligned" in without_detector.body.decode()
    assert endpoint.ask("GET", "/readyz").status == 200
    (model,) = endpoint.ask("GET", "/v1/models").json["models"]
    assert model["side"] == tiny.SIDE


def check_answers(answers: list[Answer]) -> None:
    """Every request was answered, by an image or by a 503 that says when to ask again."""
    strange = [answer for answer in answers if answer.status not in (200, 503)]
    assert not strange, strange[:3]
    for answer in answers:
        if answer.status == 503:
            assert "retry-after" in answer.headers, answer
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json["type"] == "/problems/overloaded"
        else:
            assert decode_image(answer.body, name="answer").shape == (tiny.SIDE, tiny.SIDE, 3)


@ray_test
def test_more_than_fits_is_refused_at_once_and_the_rest_is_answered(endpoint: Client) -> None:
    """Of 80 at a time the model takes 8, 32 may wait, and the ingress has room for 64."""
    with ThreadPoolExecutor(80) as pool:
        answers = list(pool.map(lambda n: endpoint.restore(IMAGES[n % 8], mode="aligned", steps=20, seed=n), range(80)))
    check_answers(answers)
    statuses = [answer.status for answer in answers]
    assert statuses.count(200) >= 30
    assert statuses.count(503) >= 8


@ray_test
@pytest.mark.timeout(240)
def test_a_killed_replica_costs_no_answer(endpoint: Client) -> None:
    (replica,) = replicas("FaceModel")
    with endpoint.load(IMAGES, 6, mode="aligned", steps=4) as answers:
        wait_for(lambda: len(answers) > 10)
        os.kill(replica.pid, signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: sum(a.status == 200 and a.started > killed + 0.5 for a in list(answers)) > 10, 120)
    check_answers(answers)
    assert [process.pid for process in replicas("FaceModel")] != [replica.pid]


@ray_test
@pytest.mark.timeout(180)
def test_a_client_that_goes_away_frees_the_model(endpoint: Client) -> None:
    """The next request does not wait for what nobody reads any more."""
    long = {"mode": "aligned", "steps": 50, "samples": 8}
    whole = endpoint.restore(IMAGES[0], **long)
    assert whole.status == 200
    with socket.create_connection(("127.0.0.1", endpoint.port)) as connection:
        lines = [f"POST /v1/restorations?{urlencode(long)} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: image/png"]
        head = "\r\n".join([*lines, f"Content-Length: {len(IMAGES[0])}", "", ""]).encode()
        connection.sendall(head + IMAGES[0])
        time.sleep(whole.seconds / 10)
    started = time.monotonic()
    assert endpoint.restore(IMAGES[1], mode="aligned", steps=1).status == 200
    assert time.monotonic() - started < 0.6 * whole.seconds


# ---- redeploys and whole commands, which take minutes ----


@ray_test
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_new_weights_under_load_without_a_failed_request(endpoint: Client, weights: Path, tmp_path: Path) -> None:
    other = new_weights(tmp_path / "other", 1)
    expected = [alone(folder, IMAGES[0], steps=2) for folder in (weights, other)]
    images = {own.weights_digest: decode_image(own.image, name="alone").astype(int) for own in expected}
    first, second = images.values()
    apart = np.abs(first - second).mean()
    with endpoint.load(IMAGES[:1], 4, mode="aligned", steps=2) as answers:
        wait_for(lambda: len(answers) > 5)
        deploy(other, deadline_seconds=50)
        done = time.monotonic()
        wait_for(lambda: sum(answer.started > done + 5 for answer in list(answers)) > 5)
    assert {answer.status for answer in answers} == {200}
    assert {answer.headers["x-weights-digest"] for answer in answers} == set(images)
    for (
        answer
    ) in answers:  # by the weights that it names; what else is in a batch decides how single pixels are rounded
        image = decode_image(answer.body, name="answer")
        assert np.abs(image - images[answer.headers["x-weights-digest"]]).mean() < apart / 20
    late = [answer for answer in answers if answer.started > done + 5]
    assert {answer.headers["x-weights-digest"] for answer in late} == {expected[1].weights_digest}
    deploy(weights)


@ray_test
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_more_work_makes_more_replicas_and_less_fewer(endpoint: Client, weights: Path) -> None:
    deploy(weights, max_replicas=2, upscale_delay_seconds=1, downscale_delay_seconds=5, batch_faces=2)
    try:
        assert len(replicas("FaceModel")) == 1
        with endpoint.load(IMAGES, 16, mode="aligned", steps=40) as answers:
            wait_for(lambda: len(replicas("FaceModel")) == 2, 120)
        check_answers(answers)
        wait_for(lambda: len(replicas("FaceModel")) == 1, 180)
    finally:
        deploy(weights)


def visit(endpoint: Client, number: int) -> int:
    """One of an hour's clients: most send a face, some do it wrong, some leave; the status, 0 for who left."""
    image = IMAGES[number % 8]
    match number % 12:
        case 0:
            with socket.create_connection(("127.0.0.1", endpoint.port)) as connection:
                head = f"POST /v1/restorations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(image)}\r\n\r\n"
                connection.sendall(head.encode() + image[: len(image) // 2])
            return 0
        case 1:
            return endpoint.restore(b"no image at all", mode="aligned").status
        case 2:
            return endpoint.restore(image, mode="aligned", steps=99).status
        case 3:
            return endpoint.restore(image, "/v1/restorations/stream", mode="aligned", steps=3).status
        case 4:
            return endpoint.restore(image, mode="aligned", steps=2, samples=2, seed=number).status
        case _:
            return endpoint.restore(image, mode="aligned", steps=2).status


@ray_test
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_hours_requests_beside_a_thousand_idle_connections_leave_memory_flat(endpoint: Client) -> None:
    """3,600 requests, one a second for an hour, as fast as they are answered."""

    def memory() -> float:
        processes = [*replicas("FaceModel"), *replicas("Endpoint")]
        return sum(process.memory_info().rss for process in processes) / 2**20

    expected = [0, 422, 422, *[200] * 9]
    with ExitStack() as idle, ThreadPoolExecutor(4) as clients:
        for _ in range(1000):
            idle.enter_context(closing(socket.create_connection(("127.0.0.1", endpoint.port))))
        levels = []
        for first in range(0, 4800, 1200):  # the first 1,200 fill what is kept once
            statuses = list(clients.map(partial(visit, endpoint), range(first, first + 1200)))
            assert statuses == expected * 100
            levels.append(memory())
    print("MiB after every 1,200 requests:", [round(level) for level in levels])
    assert levels[-1] < 1.05 * levels[0], levels


@ray_test
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_serve_run_as_typed(tmp_path: Path) -> None:
    """`serve run serve.app:build_app weights=faces_64`, and Ctrl-C."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("port 8000, which `serve run` takes, is in use on this machine")
    command = [Path(sys.executable).with_name("serve"), "run", "serve.app:build_app", "weights=faces_64"]
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
    try:
        client = Client(8000)
        client.wait_ready(180)
        answer = client.restore(IMAGES[0], mode="aligned")
        assert answer.status == 200, answer
        assert decode_image(answer.body, name="answer").shape == (64, 64, 3)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(120) is not None
