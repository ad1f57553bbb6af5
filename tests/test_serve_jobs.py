"""Archive jobs of the endpoint: on a real Ray head's job server, over the application's own routes."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.test_job_submit as submitting
from ldbfr.client import Client, Retries, ServerError
from serve.api import make_app
from serve.jobs import MARK, REPOSITORY, SCRIPT, THREADS, RayJobs, message_of, progress_of, status_of
from serve.jobs_protocol import JobNotFound, JobRequest
from serve.protocol import Overloaded
from serve.settings import EndpointSettings
from tests import tiny
from tests.archiving import outputs, png, put_files
from tests.scripted import as_json, raw, serving
from tests.serving import FakeRestorer, running


@pytest.fixture(scope="module")
def head(s3_endpoint: str) -> Iterator[submitting.Head]:
    """A Ray head of its own, which knows the S3 server and, as this process does, no tokens."""
    with submitting.running_head({}) as made:
        yield made


REQUEST = JobRequest(input="s3://bucket/in", output="s3://bucket/out")
SHELL = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=30)


def details(status: str = "RUNNING", **more: Any) -> Any:
    """A job as Ray tells of it."""
    values = {
        "submission_id": "restore-0123456789abcdef",
        "status": status,
        "message": None,
        "driver_exit_code": None,
        "start_time": 1,
        "metadata": {MARK: "ldbfr", "input": "s3://bucket/in", "output": "s3://bucket/out"},
    }
    return SimpleNamespace(**{**values, **more})


# ---- the command ----


@settings(max_examples=25, deadline=None)
@given(name=SHELL)
def test_whatever_a_place_is_called_it_stays_one_argument(name: str) -> None:
    place = "s3://bucket/" + name.strip("/").replace("//", "/").replace("/", "$(touch x);'\"`&|>")
    request = JobRequest.model_construct(input=place, output=place + "-out", faces="all", format="same")
    jobs = RayJobs(script="-c", options=("import sys, json; print(json.dumps(sys.argv))", "--workers", "1:4"))
    command = jobs.entrypoint(request)
    assert command.startswith("python -c --input")
    echo = command.replace("python -c", f"{sys.executable} -c 'import sys, json; print(json.dumps(sys.argv[1:]))'", 1)
    done = subprocess.run(echo, shell=True, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said[:8] == ["--input", place, "--output", place + "-out", "--faces", "all", "--format", "same"]
    assert said[-2:] == ["--workers", "1:4"]


def test_the_command_is_one_that_the_job_understands() -> None:
    import tyro

    from jobs.restore import Restore

    request = JobRequest(input="s3://bucket/in put", output="s3://bucket/out", faces="largest", format="webp")
    python, script, *arguments = shlex.split(RayJobs(options=("--weights", "faces_64")).entrypoint(request))
    assert (python, script) == ("python", "jobs/restore.py")
    parsed = tyro.cli(Restore, args=arguments)
    assert (parsed.input, parsed.output) == (("s3://bucket/in put",), "s3://bucket/out")
    assert (parsed.photos.faces, parsed.format, parsed.weights) == ("largest", "webp", "faces_64")


# ---- what Ray says ----


@pytest.mark.parametrize(
    ("ray", "ours"),
    [
        ("PENDING", "pending"),
        ("RUNNING", "running"),
        ("SUCCEEDED", "succeeded"),
        ("FAILED", "failed"),
        ("STOPPED", "cancelled"),
    ],
)
def test_a_status_by_rays_name(ray: str, ours: str) -> None:
    from ray.job_submission import JobStatus as RayStatus

    status = status_of(details(RayStatus(ray)))
    assert (status.status, status.input, status.output) == (ours, "s3://bucket/in", "s3://bucket/out")
    assert set(RayStatus) == {"PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"}, "all are known"


def test_of_a_failed_jobs_log_only_its_own_last_word_is_told() -> None:
    log = "Job entrypoint command failed with exit code 1:\n/secret/path\nrestore: first\nrestore: no bucket b\nmore"
    assert message_of(details("FAILED", message=log, driver_exit_code=1)) == "no bucket b"
    assert "exit code 137" in message_of(details("FAILED", message="/secret/path", driver_exit_code=137))
    assert "secret" not in message_of(details("FAILED", message="/secret/path"))
    assert message_of(details("RUNNING", message=log)) == ""


def test_no_run_no_progress(tmp_path: Path) -> None:
    assert progress_of(str(tmp_path)) is None


def server_of(*jobs: Any, status: int = 200) -> Any:
    """A job server that has these jobs."""
    known = [
        {**vars(one), "type": "SUBMISSION", "entrypoint": "python x", "start_time": number}
        for number, one in enumerate(jobs)
    ]

    def reply(handler: Any) -> None:
        if handler.path == "/api/version":
            as_json({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})(handler)
        elif status != 200:
            raw(status, b"no")(handler)
        elif handler.path == "/api/jobs/":
            as_json(known)(handler)
        else:
            found = [one for one in known if one["submission_id"] == handler.path.rpartition("/")[2]]
            as_json(found[0])(handler) if found else raw(404, b"none")(handler)

    return serving(reply)


def test_only_our_own_jobs_are_known_and_the_newest_comes_first() -> None:
    ours, newer = details(), details(submission_id="restore-" + "1" * 16)
    others = [
        details(submission_id="restore-" + "2" * 16, metadata={MARK: "another"}),
        details(submission_id="restore-" + "3" * 16, metadata=None),
        details(submission_id="raysubmit_4", metadata={MARK: "ldbfr"}),
    ]
    with server_of(ours, *others, newer) as server:
        jobs = RayJobs(server.url)
        assert [one.id for one in asyncio.run(jobs.list())] == [newer.submission_id, ours.submission_id]
        count = len(server.asked)
        for id in (*(one.submission_id for one in others), "restore-" + "9" * 16, "../../x", "", "restore-1/stop"):
            with pytest.raises(JobNotFound, match="GET /v1/jobs lists them"):
                asyncio.run(jobs.get(id))
            with pytest.raises(JobNotFound):
                asyncio.run(jobs.cancel(id))
        paths = {one.path for one in server.asked[count:]}
        assert all(path.startswith("/api/jobs/restore-") and "stop" not in path for path in paths)
        jobs.close()


def test_not_too_many_at_a_time() -> None:
    with server_of(details("RUNNING"), details("PENDING"), details("FAILED")) as server:
        jobs = RayJobs(server.url, most_active=2)
        with pytest.raises(Overloaded, match="2 jobs are pending or running, at most 2"):
            asyncio.run(jobs.submit(REQUEST))
        jobs.close()
    assert all(one.method == "GET" for one in server.asked)


def test_a_job_server_that_fails_or_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    with server_of(status=500) as server:
        jobs = RayJobs(server.url)
        with pytest.raises(Overloaded, match="does not answer"):
            asyncio.run(jobs.list())
    with pytest.raises(Overloaded, match="ask again later"):
        asyncio.run(jobs.get("restore-" + "1" * 16))
    jobs.close()
    assert "job server" in caplog.text


def test_a_job_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.jobs.ANSWER_SECONDS", 0.2)
    over = threading.Event()

    def hang(handler: Any) -> None:
        over.wait(20)
        handler.drop()

    with serving(hang) as server:
        jobs = RayJobs(server.url)
        started = time.monotonic()
        try:
            with pytest.raises(Overloaded, match="does not answer"):
                asyncio.run(jobs.list())
            assert time.monotonic() - started < 10
        finally:
            over.set()
            jobs.close()


def test_slow_progress_keeps_nobody_from_the_job_server(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("serve.jobs.progress_of", lambda output: over.wait(20) and None)

    async def asked(jobs: RayJobs, id: str) -> None:
        looks = [asyncio.create_task(jobs.get(id)) for _ in range(2 * THREADS)]
        await asyncio.sleep(0.5)
        try:
            assert len(await asyncio.wait_for(jobs.list(), 5)) == 1
        finally:
            over.set()
        assert all(one.status == "running" for one in await asyncio.gather(*looks))

    with server_of(details()) as server:
        jobs = RayJobs(server.url)
        asyncio.run(asked(jobs, details().submission_id))
        jobs.close()


def test_a_job_that_was_taken_without_a_word_is_not_begun_twice() -> None:
    taken: list[dict[str, Any]] = []

    def reply(handler: Any) -> None:
        asked = handler.server.asked[-1]
        if asked.path == "/api/version":
            as_json({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})(handler)
        elif asked.method == "POST":
            job = json.loads(asked.body)
            one = details("PENDING", submission_id=job["submission_id"], metadata=job["metadata"])
            taken.append({**vars(one), "type": "SUBMISSION", "entrypoint": job["entrypoint"]})
            handler.drop()
        elif asked.path == "/api/jobs/":
            as_json(taken)(handler)
        else:
            as_json(taken[0])(handler)

    with serving(reply) as server:
        jobs = RayJobs(server.url)
        status = asyncio.run(jobs.submit(REQUEST))
        assert [one.id for one in asyncio.run(jobs.list())] == [status.id]
        jobs.close()
    assert taken[0]["metadata"] == {MARK: "ldbfr", **REQUEST.model_dump()}


# ---- the whole of it ----


@contextmanager
def endpoint(head: submitting.Head, bucket: str, script: Path, *options: str) -> Iterator[Client]:
    """A client of the endpoint with jobs on the head."""
    runtime_env = {"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
    jobs = RayJobs(head.address, options=options, script=str(script), runtime_env=runtime_env)
    patient = Retries(max_retries=40)  # a head's agents come up one after the other
    with (
        running(make_app(FakeRestorer(), EndpointSettings(job_buckets=(bucket,)), jobs)) as url,
        Client(url, retries=patient) as client,
    ):
        yield client
    jobs.close()


SCRIPT_THAT_SAYS_WHAT_IT_WAS_ASKED = """
import sys, time
if "s3://bucket/long" in sys.argv:
    time.sleep(600)
print("restore:", *sys.argv[1:])
sys.exit(1)
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_jobs_on_a_real_job_server(head: submitting.Head, tmp_path: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    script = tmp_path / "a script.py"
    script.write_text(SCRIPT_THAT_SAYS_WHAT_IT_WAS_ASKED)
    with endpoint(head, "s3://bucket", script, "--weights", "$HOME") as client:
        long = client.submit_job("s3://bucket/long", "s3://bucket/out")
        short = client.submit_job("s3://bucket/a b", "s3://bucket/out")
        foreign = JobSubmissionClient(head.address).submit_job(entrypoint="echo hello")
        client.cancel_job(long.id)
        assert client.wait_job(long.id, every=0.5, timeout=90).status == "cancelled"
        done = client.wait_job(short.id, every=0.5, timeout=90)
        assert done.status == "failed"
        said = "--input s3://bucket/a b --output s3://bucket/out --faces all --format same --weights $HOME"
        assert done.message == said
        assert client.cancel_job(short.id).status == "failed", "what is over stays as it is"
        assert {one.id for one in client.jobs()} == {long.id, short.id}
        with pytest.raises(ServerError, match="404"):
            client.job(foreign)
        with pytest.raises(ServerError, match="403"):
            client.submit_job("s3://bucket/in", "s3://elsewhere/out")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_a_batch_from_bucket_to_bucket(head: submitting.Head, s3_root: str, tmp_path: Path) -> None:
    tiny.new_pipeline().save_pretrained(tmp_path / "weights")
    put_files(f"{s3_root}/in", {f"{number}.png": png(number, 40) for number in range(3)} | {"bad.png": b"no image"})
    options = ("--weights", str(tmp_path / "weights"), "--steps", "1", "--workers", "1")
    with endpoint(head, s3_root, REPOSITORY / SCRIPT, *options) as client:
        begun = client.submit_job(f"{s3_root}/in", f"{s3_root}/out", faces="none", format="png")
        done = client.wait_job(begun.id, every=0.5, timeout=200)
        assert (done.status, done.message) == ("succeeded", ""), done
        assert done.progress is not None
        assert {name: done.progress[name] for name in ("planned", "restored", "failed", "skipped")} == {
            "planned": 4,
            "restored": 3,
            "failed": 1,
            "skipped": 0,
        }
        assert set(outputs(f"{s3_root}/out")) == {"0.png", "1.png", "2.png"}

        wrong = client.submit_job(f"{s3_root}/in", f"{s3_root}/out", faces="none", format="webp")
        refused = client.wait_job(wrong.id, every=0.5, timeout=90)
        assert refused.status == "failed"
        assert "begun with other settings" in (refused.message or "")
        assert refused.progress is None
