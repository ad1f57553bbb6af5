"""cluster/monitoring: queries that parse, rules that fire, and no metric that the software does not export."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldbfr.images import encode_image
from tests import tiny
from tests.conftest import REPOSITORY
from tests.manifests import CLUSTER, check, pods, rendered
from tests.serve_load import Client, wait_for

promql_parser = pytest.importorskip("promql_parser", reason="needs the extra test")

MONITORING = CLUSTER / "monitoring"
ALERTS = MONITORING / "alerts.yaml"
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$__interval": "1m"}
PROMETHEUS_OWN = {"up"}
"""Made by Prometheus itself."""


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """Every query by where it stands, without Grafana's variables."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in panels():
        for number, target in enumerate(panel["targets"]):
            found[f"panel {panel['title']} {number}"] = target["expr"]
    for place, query in found.items():
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        found[place] = query
    return found


def names_in(query: str) -> set[str]:
    """The metrics that a query reads."""
    found: set[str] = set()

    def visit(node: Any) -> None:
        selector = getattr(node, "vector_selector", node)
        if isinstance(selector, promql_parser.VectorSelector):
            found.add(selector.name)

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


# ---- texts ----


@pytest.mark.parametrize("place", queries())
def test_queries_parse(place: str) -> None:
    query = queries()[place]
    assert "$" not in query, "a variable of Grafana's that the test does not know"
    assert names_in(query)


def test_alerts_say_what_is_wrong_and_what_to_do() -> None:
    found = {rule["alert"]: rule for rule in rules()}
    assert len(found) == len(rules())
    for name, rule in found.items():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}, name
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert set(rule["annotations"]) == {"summary", "description"}, name
        assert "{{ $value" in rule["annotations"]["description"] + rule["annotations"]["summary"], name


def test_prometheus_accepts_its_configuration_and_the_rules_fire(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("this test needs promtool on PATH (Debian's package prometheus has it)")
    for file in MONITORING.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    check_configuration = [promtool, "check", "config", "--syntax-only", "prometheus.yaml"]
    done = subprocess.run(check_configuration, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    if "field kubernetes_sd_configs not found" in done.stdout + done.stderr:
        # Debian's promtool is built without what finds pods; the rest can be looked at all the same.
        configuration = yaml.safe_load((tmp_path / "prometheus.yaml").read_text())
        assert set(configuration["scrape_configs"][0].pop("kubernetes_sd_configs")[0]) == {"role", "namespaces"}
        (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    for command in (
        ["check", "config", "--syntax-only", "prometheus.yaml"],
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts-test.yaml"],
    ):
        done = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_laid_out() -> None:
    board = json.loads((MONITORING / "dashboard.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_what_is_applied_keeps_to_its_schema_and_is_confined() -> None:
    found = rendered("monitoring")
    for document in found:
        check(document)
        for pod in pods(document):
            assert pod.spec["securityContext"]["runAsNonRoot"] is True
            for container in pod.spec["containers"]:
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                assert {"requests", "limits"} <= set(container["resources"])
    configuration = {
        document["metadata"]["name"]: document["data"] for document in found if document["kind"] == "ConfigMap"
    }
    assert configuration["prometheus"]["alerts.yaml"] == ALERTS.read_text()
    assert json.loads(configuration["grafana-dashboards"]["dashboard.json"])["title"]


# ---- the metrics themselves ----

SOMETIMES = {
    "ray_node_gram_used": "a GPU",
    "ray_node_gram_available": "a GPU",
    "ray_node_gpus_utilization": "a GPU",
    "ray_cluster_pending_nodes": "an autoscaler",
}
"""What a machine without one of these does not export; Ray's own list of gauges has it all the same."""
SERVE_SECONDS = 60


def wanted() -> dict[str, set[str]]:
    """Every metric that a query reads, with the queries' places."""
    found: dict[str, set[str]] = {}
    for place, query in queries().items():
        for name in names_in(query) - PROMETHEUS_OWN:
            found.setdefault(name, set()).add(place)
    return found


class Scrapes:
    """Asks the node's exporter every second, as Prometheus would, and keeps the last line of every sample's name."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        while not self.over.wait(1.0):
            with suppress(OSError):
                self.look()

    def look(self) -> None:
        import ray

        port = ray.nodes()[0]["MetricsExportPort"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
        for line in lines:
            self.lines.setdefault(re.split(r"[{ ]", line)[0], []).append(line)

    def __enter__(self) -> Scrapes:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def labels(self, name: str) -> set[str]:
        """All labels that samples of this name had."""
        return {label for line in self.lines[name] for label in re.findall(r'[{,](\w+)="', line)}


@pytest.fixture(scope="module")
def scrapes(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scrapes]:
    """Everything that a node exported while it trained, restored an archive, and answered requests well and badly."""
    folder = tmp_path_factory.mktemp("monitored")
    tiny.new_pipeline().save_pretrained(folder / "weights")
    with Scrapes() as found:
        train_something(folder)
        wait_for(lambda: "ray_ldbfr_training_checkpoint_timestamp_seconds" in found.lines, SERVE_SECONDS)
        restore_something(folder)
        wait_for(lambda: "ray_ldbfr_archive_images_total" in found.lines, SERVE_SECONDS)
        with serving(folder) as client:
            face = encode_image(tiny.blob_faces(1, side=48)[0], "png")
            assert client.restore(face, mode="aligned").status == 200
            assert client.restore(b"no image", mode="aligned").status == 422
            names = set(wanted()) - set(SOMETIMES)
            with suppress(AssertionError, TimeoutError):  # the test names what is missing
                wait_for(lambda: names <= set(found.lines), SERVE_SECONDS)
        yield found


def train_something(folder: Path) -> None:
    from jobs import train

    with tarfile.open(folder / "faces.tar", "w") as archive:
        for number, face in enumerate(tiny.blob_faces(8)):
            content = encode_image(face, "png")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    arguments = ["--preset", "tiny", "--stage", "hq_vqgan", "--data", str(folder / "faces.tar")]
    arguments += ["--set", "training.hq_vqgan.steps=800", "--set", "training.hq_vqgan.checkpoint_every=100"]
    assert train.main([*arguments, "--run", str(folder / "run"), "--cpus-per-worker", "1", "--no-validate"]) == 0


def restore_something(folder: Path) -> None:
    from jobs import restore
    from tests.archiving import png, put_files

    images = {f"{number}.png": png(number) for number in range(40)}
    put_files(str(folder / "in"), {**images, "bad.png": b""})
    # Several units: there is no rate, and no time left, before the second.
    arguments = ["--input", str(folder / "in"), "--output", str(folder / "out"), "--shard-images", "2"]
    assert restore.main([*arguments, "--weights", str(folder / "weights"), "--workers", "1"]) == 0


@contextmanager
def serving(folder: Path) -> Iterator[Client]:
    from ray import serve as ray_serve

    from serve.app import build_app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDBFR_FACE_DETECTOR", "/nowhere/detector.onnx")
        ray_serve.start(http_options={"port": port})
        settings = {"weights": str(folder / "weights"), "threads": 1, "cpus_per_replica": 0.1, "max_replicas": 2}
        ray_serve.run(build_app(settings), name="ldbfr", route_prefix="/")
        client = Client(port)
        client.wait_ready()
        try:
            yield client
        finally:
            ray_serve.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_metric_of_alerts_and_dashboard_is_exported(scrapes: Scrapes) -> None:
    missing = {name: places for name, places in wanted().items() if name not in scrapes.lines and name not in SOMETIMES}
    assert not missing


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_labels_that_queries_choose_and_group_by_are_there(scrapes: Scrapes) -> None:
    by_prometheus = {"cluster", "work", "node_type", "group", "pod", "job", "le"}
    for place, query in queries().items():
        labels = set(re.findall(r'[{,]\s*(\w+)\s*=~?"', query))
        labels |= {label.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", query) for label in group.split(",")}
        known = {label for name in names_in(query) & set(scrapes.lines) for label in scrapes.labels(name)}
        if names_in(query) & set(scrapes.lines):
            assert labels - by_prometheus <= known, place


def test_what_is_exported_sometimes_is_in_rays_list() -> None:
    reporter = pytest.importorskip("ray.dashboard.modules.reporter.reporter_agent")
    assert {name.removeprefix("ray_") for name in SOMETIMES} <= set(reporter.METRICS_GAUGES)
    assert set(SOMETIMES) <= set(wanted())


def test_every_metric_of_ours_is_watched() -> None:
    """What jobs and replicas give to Ray is on the dashboard, so that nobody exports for nothing."""
    source = "".join((REPOSITORY / name).read_text() for name in ("jobs/metrics.py", "serve/replicas.py"))
    ours = set(re.findall(r'"(ldbfr_\w+)",', source))
    assert len(ours) >= 10
    watched = {re.sub(r"_(bucket|sum|count)$", "", name.removeprefix("ray_")) for name in wanted()}
    assert ours <= watched
