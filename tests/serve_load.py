"""What tests of the endpoint on Ray share: requests over HTTP without a client library, and a load of them."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import psutil


@dataclass(frozen=True)
class Answer:
    """What came back. `status` 0: the connection broke."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0
    started: float = 0.0

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    """Speaks to an endpoint on this machine."""

    port: int

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own."""
        started = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            return Answer(0, {}, repr(error).encode(), time.monotonic() - started, started)
        finally:
            connection.close()
        names = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, names, content, time.monotonic() - started, started)

    def restore(self, image: bytes, path: str = "/v1/restorations", **options: Any) -> Answer:
        """Restore an image."""
        query = urlencode(options, doseq=True)
        return self.ask("POST", f"{path}?{query}", image, {"Content-Type": "application/octet-stream"})

    def wait_ready(self, seconds: float = 60) -> None:
        """Until it says that it is ready."""
        wait_for(lambda: self.ask("GET", "/readyz").status == 200, seconds)

    @contextmanager
    def load(self, images: Sequence[bytes], clients: int, **options: Any) -> Iterator[list[Answer]]:
        """So many clients who ask again as soon as they are answered, as long as the context lasts; all answers."""
        answers: list[Answer] = []
        stop = threading.Event()

        def client(number: int) -> None:
            count = 0
            while not stop.is_set():
                answer = self.restore(images[(number + count) % len(images)], **options)
                answers.append(answer)
                count += 1
                if answer.status == 503:
                    stop.wait(0.2)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield answers
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds:g} s"
        time.sleep(0.05)


def replicas(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas, of the cluster that this process started."""
    found = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::ServeReplica") and f":{deployment}" in title:
            found.append(process)
    return found
