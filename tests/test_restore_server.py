"""`ldbfr restore --server` as users give it, against the endpoint's own application over HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldbfr.archive import files_served
from ldbfr.cli import main
from ldbfr.client import Client, Retries
from ldbfr.faces import DETECTOR_FILE
from ldbfr.images import decode_image
from ldbfr.metadata import Metadata, encode_with_metadata, read_provenance
from serve.api import make_app
from serve.protocol import RestorationOptions, Restored
from serve.settings import EndpointSettings
from tests import tiny
from tests.conftest import REPOSITORY
from tests.scripted import Handler, as_json, restored_of, serving
from tests.serving import DIGEST, FakeRestorer, picture, running


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@dataclass
class Stamping(FakeRestorer):
    """Inverts colours, and says in the result where it comes from, as the real restorer does.

    Args:
        digest: of the weights.
        most: after so many restorations there is an error.
    """

    digest: str = DIGEST
    most: int = 10**6
    at_a_time: list[int] = field(default_factory=list)
    ongoing: int = 0

    async def info(self) -> Any:
        return replace(await super().info(), weights_digest=self.digest)

    async def restore(self, data: bytes, options: RestorationOptions, deadline: float) -> Restored:
        if len(self.calls) >= self.most:
            raise RuntimeError("the process is about to die")
        self.ongoing += 1
        self.at_a_time.append(self.ongoing)
        try:
            found = await super().restore(data, options, deadline)
        finally:
            self.ongoing -= 1
        about = {
            "software": "ldbfr of another version",
            "weights": self.digest,
            "settings": hashlib.sha256(options.model_dump_json().encode()).hexdigest(),
            "seed": options.seed,
            "input_sha256": hashlib.sha256(data).hexdigest(),
        }
        pixels = decode_image(found.image, name="result")
        image = encode_with_metadata(pixels, found.format, metadata=Metadata(), provenance=about)
        return replace(found, image=image, weights_digest=self.digest, notes="1 face left alone (smaller)")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`ldbfr restore` in this process; it is impatient."""
    monkeypatch.setattr(files_served, "PATIENT", Retries(max_retries=2, first=0.01, longest=0.01))
    monkeypatch.delenv("LDBFR_API_KEY", raising=False)

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["ldbfr", "restore", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return Done(1, out, err + code) if isinstance(code, str) else Done(int(code or 0), out, err)

    return run


@pytest.fixture
def restorer() -> Stamping:
    return Stamping()


@pytest.fixture
def url(restorer: Stamping) -> Iterator[str]:
    with running(make_app(restorer, EndpointSettings())) as address:
        yield address


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Photos of several formats, in folders."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(64, 48))
    (folder / "b.jpg").write_bytes(picture(60, 48, "jpeg"))
    (folder / "sub" / "c.webp").write_bytes(picture(56, 48, "webp"))
    (folder / "sub" / "d.png").write_bytes(picture(52, 48))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the real restorer ----


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tiny.new_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def real_url(weights: Path, shared_data: Path) -> Iterator[str]:
    """The endpoint with the tiny model and the real detector."""
    from serve.model import LocalFaceModel
    from serve.restoring import PhotoService

    model = LocalFaceModel.load(str(weights), device="cpu", batch_faces=16, batch_wait=0.01)
    service = PhotoService(model, detector=shared_data / "weights" / DETECTOR_FILE.name)
    with running(make_app(service, EndpointSettings())) as address:
        yield address


@pytest.mark.parametrize("faces", ["all", "none"])
def test_a_server_and_this_machine_make_the_same_files_and_go_on_for_each_other(
    command: Command,
    weights: Path,
    real_url: str,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    faces: str,
) -> None:
    monkeypatch.setenv("LDBFR_FACE_DETECTOR", str(shared_data / "weights" / DETECTOR_FILE.name))
    source = tmp_path / "in"
    source.mkdir()
    for name in ("00", "01"):
        photo = Image.open(shared_data / "real-lq" / "photos" / f"{name}.jpg")
        for suffix in ("jpg", "png"):  # blurred, or the tiny model would leave its faces alone
            photo.filter(ImageFilter.GaussianBlur(2)).save(source / f"{name}.{suffix}", quality=95)
    options = (source, "--faces", faces, "--steps", "2", "--seed", "5", "--side-by-side")
    here, there = tmp_path / "here", tmp_path / "there"
    local = (*options, "--weights", weights, "--device", "cpu")
    remote = (*options, "--server", real_url)

    assert command(*remote, "-o", there).code == 0
    assert command(*local, "-o", here).code == 0

    mine, theirs = files_of(here), files_of(there)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert read_provenance(mine[name], name=name) == read_provenance(theirs[name], name=name)
        one, other = (decode_image(files[name], name=name).astype(int) for files in (mine, theirs))
        if name.startswith("_side") and name.endswith("jpg"):
            assert np.abs(one - other).mean() < 1, "the server's result went through JPEG before it was put beside"
        else:
            assert np.abs(one - other).max() <= 2, "a batch of another size may round otherwise"
    assert "4 skipped" in command(*local, "-o", there).out
    assert "4 skipped" in command(*remote, "-o", here).out
    other = command(*remote, "-o", here, "--condition-scale", "0.5")
    assert (other.code, "0 of 4 images restored, 4 failed" in other.out) == (1, True)
    assert files_of(here) == mine


# ---- files in and out ----


def test_the_files_are_the_servers_answers(command: Command, url: str, album: Path, tmp_path: Path) -> None:
    done = command(album, "-o", tmp_path / "out", "--server", url, "--steps", "3", "--details", tmp_path / "d.jsonl")

    assert done.code == 0, done.err
    assert "4 of 4 images restored, 0 failed" in done.out
    assert "a.png: 1 face left alone (smaller)" in done.out
    with Client(url) as client:
        answers = {name: client.restore(data, steps=3).image for name, data in files_of(album).items()}
    assert files_of(tmp_path / "out") == answers
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert {Path(line["input"]).name for line in lines} == {"a.png", "b.jpg", "c.webp", "d.png"}
    assert all(line["status"] == "restored" and len(line["faces"]) == 2 for line in lines)


def test_what_is_asked_for(command: Command, url: str, restorer: Stamping, album: Path, tmp_path: Path) -> None:
    boxes = ("--box", "1,2,30,40", "--box", "5,6,7.5,8")
    more = ("--seed", "9", "--samples", "2", "--strength", "0.5", "--quality", "80", "--condition-scale", "1.5")
    assert command(album / "a.png", "-o", tmp_path / "a.jpg", "--server", url, *boxes, *more).code == 0
    assert command(album / "b.jpg", "-o", tmp_path / "b.jpg", "--server", url, "--faces", "none").code == 0

    first, second = restorer.calls
    assert first == RestorationOptions(
        seed=9,
        samples=2,
        strength=0.5,
        quality=80,
        condition_scale=1.5,
        boxes=((1, 2, 30, 40), (5, 6, 7.5, 8)),
        format="jpeg",
    )
    assert second == RestorationOptions(mode="aligned")
    assert decode_image((tmp_path / "a.jpg").read_bytes(), name="a").shape == (48, 64, 3)


def test_a_chosen_format_and_files_of_others(command: Command, url: str, album: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(album / "e.bmp")
    assert command(album, "-o", tmp_path / "same", "--server", url).code == 0
    assert command(album, "-o", tmp_path / "png", "--server", url, "--format", "png").code == 0
    assert set(files_of(tmp_path / "same")) == {"a.png", "b.jpg", "e.bmp.png", "sub/c.webp", "sub/d.png"}
    assert set(files_of(tmp_path / "png")) == {"a.png", "b.jpg.png", "e.bmp.png", "sub/c.webp.png", "sub/d.png"}
    assert all(data.startswith(b"\x89PNG") for data in files_of(tmp_path / "png").values())


def test_several_at_a_time_and_no_more(
    command: Command, url: str, restorer: Stamping, album: Path, tmp_path: Path
) -> None:
    restorer.seconds = 0.2
    assert command(album, "-o", tmp_path / "a", "--server", url, "--workers", "1").code == 0
    assert max(restorer.at_a_time) == 1
    assert command(album, "-o", tmp_path / "b", "--server", url, "--workers", "3").code == 0
    assert max(restorer.at_a_time) == 3


# ---- going on ----


def test_what_is_done_is_passed_by_for_the_price_of_one_request(
    command: Command, url: str, restorer: Stamping, album: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert command(album, "-o", out, "--server", url, "--format", "png").code == 0
    before = files_of(out)
    restorer.calls.clear()

    again = command(album, "-o", out, "--server", url, "--format", "png")
    assert (again.code, len(restorer.calls)) == (0, 1)
    assert "0 of 4 images restored, 0 failed, 4 skipped" in again.out

    (out / "a.png").unlink()
    restorer.calls.clear()
    assert (
        "1 of 4 images restored, 0 failed, 3 skipped"
        in command(album, "-o", out, "--server", url, "--format", "png").out
    )
    assert len(restorer.calls) <= 2
    assert files_of(out) == before


@pytest.mark.parametrize("change", [("--seed", "1"), ("--steps", "1"), "input", "file"])
def test_other_results_are_kept_unless_overwritten(
    command: Command, url: str, album: Path, tmp_path: Path, change: Any
) -> None:
    out, more = tmp_path / "out", change if isinstance(change, tuple) else ()
    assert command(album, "-o", out, "--server", url).code == 0
    if change == "input":
        (album / "a.png").write_bytes(picture(30, 30))
    if change == "file":
        (out / "a.png").write_bytes(picture(30, 30))
    before = files_of(out)

    refused = command(album / "a.png", "-o", out, "--server", url, *more)
    assert refused.code == 1
    assert "a.png is there already, and is of other settings or another input; see --overwrite" in refused.out
    assert files_of(out) == before
    assert command(album / "a.png", "-o", out, "--server", url, *more, "--overwrite").code == 0
    assert files_of(out)["a.png"] != before["a.png"]


def test_other_weights_are_others(command: Command, url: str, restorer: Stamping, album: Path, tmp_path: Path) -> None:
    assert command(album, "-o", tmp_path / "out", "--server", url).code == 0
    restorer.digest = "e" * 64
    assert "0 of 4 images restored, 4 failed" in command(album, "-o", tmp_path / "out", "--server", url).out


def test_weights_that_change_on_the_way_stop_it(
    command: Command, url: str, restorer: Stamping, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = restorer.restore

    async def restore(*arguments: Any) -> Restored:
        if len(restorer.calls) == 2:
            restorer.digest = "e" * 64
        return await inner(*arguments)

    monkeypatch.setattr(restorer, "restore", restore)
    done = command(album, "-o", tmp_path / "out", "--server", url, "--workers", "1")
    assert done.code == 1
    assert "other weights by now (eeeeeeeeeeee, before dddddddddddd)" in done.err
    assert len(files_of(tmp_path / "out")) == 2


# ---- what fails ----


def test_a_file_that_fails_stops_no_other(command: Command, url: str, album: Path, tmp_path: Path) -> None:
    (album / "broken.png").write_bytes(b"nothing")
    done = command(album, "-o", tmp_path / "out", "--server", url, "--details", tmp_path / "d.jsonl")

    assert done.code == 1
    assert "4 of 5 images restored, 1 failed" in done.out
    assert re.search(r"in/broken\.png: not a supported image", done.out)
    assert len(files_of(tmp_path / "out")) == 4
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    (failed,) = (line for line in lines if line["status"] == "failed")
    assert failed["reason"].startswith("not a supported image")


def test_an_error_of_the_server_is_one_of_the_file(
    command: Command, url: str, restorer: Stamping, album: Path, tmp_path: Path
) -> None:
    restorer.most = 2
    done = command(album, "-o", tmp_path / "out", "--server", url, "--workers", "1")
    assert (done.code, "2 of 4 images restored, 2 failed" in done.out) == (1, True)
    assert "answers 500" in done.out
    restorer.most = 10**6
    assert "2 of 4 images restored, 0 failed, 2 skipped" in command(album, "-o", tmp_path / "out", "--server", url).out


def test_a_file_over_the_servers_limit_is_not_sent(
    command: Command, restorer: Stamping, album: Path, tmp_path: Path
) -> None:
    with running(make_app(restorer, EndpointSettings(max_body_bytes=1000))) as url:
        (album / "small.png").write_bytes(picture(4, 4))
        for name in files_of(album).keys() - {"small.png"}:
            (album / name).write_bytes(bytes(1001))
        done = command(album, "-o", tmp_path / "out", "--server", url)
    assert "1 of 5 images restored, 4 failed" in done.out
    assert "the server takes at most 1,000; shrink it" in done.out
    assert len(restorer.calls) == 1


def endpoint(answer: Callable[[Handler, bytes], None]) -> Callable[[Handler], None]:
    """A scripted endpoint that answers restorations so."""
    model = {"name": "x", "side": 32, "template": "ffhq", "weights_digest": "d" * 64, "defaults": {}}
    limits = {"max_body_bytes": 10**9, "max_pixels": 10**9, "deadline_seconds": 9, "max_samples": 8}

    def reply(handler: Handler) -> None:
        if handler.path == "/v1/models":
            as_json({"models": [model]})(handler)
        elif handler.path == "/v1/limits":
            as_json(limits)(handler)
        else:
            answer(handler, handler.server.asked[-1].body)

    return reply


def test_a_file_that_kills_its_server_stops_no_other(command: Command, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / "in" / f"{number}.png").write_bytes(picture(20 + number, 20))
    poison = (tmp_path / "in" / "1.png").read_bytes()

    def answer(handler: Handler, body: bytes) -> None:
        handler.drop() if body == poison else as_json(restored_of())(handler)

    with serving(endpoint(answer)) as server:
        done = command(tmp_path / "in", "-o", tmp_path / "out", "--server", server.url, "--workers", "1")
    assert done.code == 1
    assert "3 of 4 images restored, 1 failed" in done.out
    assert "1.png: http://127.0.0.1" in done.out
    assert "broke the connection off" in done.out
    assert set(files_of(tmp_path / "out")) == {"0.png", "2.png", "3.png"}


def test_a_server_that_goes_away_stops_it_and_the_same_command_goes_on(
    command: Command, url: str, restorer: Stamping, album: Path, tmp_path: Path
) -> None:
    gone = False

    def answer(handler: Handler, body: bytes) -> None:
        nonlocal gone
        if len(handler.server.asked) > 4:
            gone = True
            handler.server.shutdown_requested = True
        handler.drop() if gone else as_json(restored_of())(handler)

    inner = endpoint(answer)
    (album / "sub" / "c.webp").unlink()
    (album / "b.jpg").unlink()
    (album / "e.png").write_bytes(picture(9, 9))
    with serving(lambda handler: handler.drop() if gone else inner(handler)) as server:
        done = command(album, "-o", tmp_path / "out", "--server", server.url, "--workers", "1")
    assert done.code == 1
    assert "broke the connection off" in done.err
    assert set(files_of(tmp_path / "out")) == {"a.png", "e.png"}


def test_no_server_at_all(command: Command, album: Path, tmp_path: Path) -> None:
    with serving(as_json({})) as server:
        address = server.url
    done = command(album, "-o", tmp_path / "out", "--server", address)
    assert done.code == 1
    assert "cannot be reached" in done.err
    assert "tried 3 times" in done.err
    assert not (tmp_path / "out").exists()


def test_a_server_of_something_else(command: Command, album: Path, tmp_path: Path) -> None:
    with serving(as_json({"hello": 1})) as server:
        done = command(album, "-o", tmp_path / "out", "--server", server.url)
    assert (done.code, "is this an endpoint of ldbfr" in done.err) == (1, True)


def test_a_key_is_asked_for_and_taken_from_the_environment(
    command: Command, restorer: Stamping, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "ldbfr_for-this-test"
    keys = tmp_path / "keys.json"
    entry = {
        "name": "me",
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "concurrency": 1,
        "rate_per_minute": 6000,
    }
    keys.write_text(json.dumps({"keys": [entry]}))
    restorer.seconds = 0.1
    monkeypatch.setattr(files_served, "PATIENT", Retries(max_retries=50, first=0.05, longest=0.05))
    with running(make_app(restorer, EndpointSettings(keys_file=keys))) as url:
        refused = command(album, "-o", tmp_path / "out", "--server", url)
        monkeypatch.setenv("LDBFR_API_KEY", key)
        done = command(album, "-o", tmp_path / "out", "--server", url)
    assert (refused.code, "LDBFR_API_KEY" in refused.err) == (1, True)
    assert done.code == 0, "with one request at a time allowed, the others wait for their turn"
    assert key not in refused.err + done.err + done.out


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--weights", "mine"), ("--weights mine with --server", "leave it out")),
        (("--device", "cpu"), ("--device cpu with --server",)),
        (("--scale", "2"), ("--scale 2 with --server",)),
        (("--no-keep-metadata",), ("--keep-metadata False with --server",)),
        (("--min-face", "30"), ("--min-face 30.0 with --server",)),
        (("--faces", "largest"), ("--faces largest with --server", "--box")),
        (("--workers", "0"), ("--workers 0",)),
        (("--box", "1,2"), ("--box 1,2",)),
        (("--samples", "99"), ("answers 422", "samples")),
        (("--samples", "2", "--steps", "99"), ("answers 422", "steps")),
    ],
)
def test_what_a_server_cannot_do_is_refused(
    command: Command, url: str, album: Path, tmp_path: Path, options: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    done = command(album, "-o", tmp_path / "out", "--server", url, *options)
    assert done.code == 1
    assert all(text in done.err for text in texts), done.err
    assert not (tmp_path / "out").exists()


def test_workers_are_for_servers(command: Command, album: Path, tmp_path: Path) -> None:
    done = command(album, "-o", tmp_path / "out", "--workers", "2")
    assert (done.code, "--workers 2 without --server" in done.err) == (1, True)


# ---- the process ----

WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "ray"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, NoTorch())

from ldbfr.cli import main

main()
"""


def process(*arguments: str | Path) -> subprocess.Popen[str]:
    """The command in a process of its own, in which torch cannot be imported."""
    command = [sys.executable, "-c", WITHOUT_TORCH, "restore", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_torch_is_not_needed(url: str, album: Path, tmp_path: Path) -> None:
    running_ = process(album, "-o", tmp_path / "out", "--server", url, "--side-by-side")
    out, err = running_.communicate(timeout=60)
    assert running_.returncode == 0, err
    assert "4 of 4 images restored" in out
    assert "HTTP Request" not in err
    assert len(files_of(tmp_path / "out")) == 8


def test_ctrl_c_ends_it_at_once(url: str, restorer: Stamping, album: Path, tmp_path: Path) -> None:
    restorer.seconds = 30
    running_ = process(album, "-o", tmp_path / "out", "--server", url)
    assert restorer.started.acquire(timeout=30)
    started = time.monotonic()
    running_.send_signal(signal.SIGINT)
    _, err = running_.communicate(timeout=20)
    assert running_.returncode == 130
    assert "the same command goes on from here" in err
    assert time.monotonic() - started < 5
    assert restorer.cancelled.acquire(timeout=5), "the server is told"
