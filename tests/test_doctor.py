"""`ldbfr doctor`: every check on the real thing where there is one, and its judgement on facts where there is none."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from ldbfr import storage
from ldbfr.cli import main
from ldbfr.doctor import addresses, machine, models, places, versions
from ldbfr.doctor.cluster import NodeReport, judge_cluster
from ldbfr.doctor.findings import Finding, as_json, as_table, exit_code, merged, ok, problem, warning
from ldbfr.doctor.machine import GIB, Gpu, GpuFacts, judge_gpus
from ldbfr.errors import ConfigError
from ldbfr.faces.detection import DETECTOR_FILE
from ldbfr.training.plan import plan_stage
from ldbfr.weights import PRETRAINED_FOLDER
from tests import tiny
from tests.conftest import REPOSITORY
from tests.faulty_proxy import FaultyProxy

pytest_plugins = ["tests.faulty_proxy"]

MIXED = [ok("one", "fine"), warning("number two", "so so\nin two lines", "look"), problem("three", "broken", "mend it")]


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    """All names must differ."""
    found = {finding.name: finding for finding in findings}
    assert len(found) == len(findings)
    return found


def assert_advised(findings: list[Finding]) -> None:
    """Whoever reads of trouble reads what to do."""
    assert all(finding.advice for finding in findings if finding.status != "ok")


# ---- tables ----


def test_a_table_has_a_line_for_each_finding_and_one_that_counts() -> None:
    lines = as_table(MIXED).splitlines()
    assert lines == [
        "ok       one         fine",
        "warning  number two  so so in two lines -> look",
        "problem  three       broken -> mend it",
        "3 checks: 1 ok, 1 warning, 1 problem",
    ]
    assert [Finding(**row) for row in json.loads(as_json(MIXED))] == MIXED


def test_only_problems_fail() -> None:
    assert [exit_code(MIXED), exit_code(MIXED[:2]), exit_code([])] == [1, 0, 0]


def test_nodes_that_agree_share_a_line() -> None:
    same, full = ok("gpu", "none"), problem("disk", "full", "free some")
    rows = merged({"a": [same, ok("disk", "free")], "b": [same, full]})
    assert [(row.name, row.status) for row in rows] == [
        ("gpu, all 2 nodes", "ok"),
        ("disk, a", "ok"),
        ("disk, b", "problem"),
    ]


# ---- versions ----


def test_this_environment_is_the_one_that_ldbfr_needs() -> None:
    found = by_name(list(versions.check_versions()))
    assert {name: row.status for name, row in found.items()} == dict.fromkeys(
        ("python", "packages", "extras", "torch pair"), "ok"
    )
    assert f"torch {metadata.version('torch')}" in found["packages"].what
    assert "ray" in found["extras"].what


def test_what_is_missing_and_what_is_too_old_is_told_apart() -> None:
    lines = [Requirement("numpy>=2"), Requirement("numpy>=999"), Requirement("ldbfr-no-such-package>=1")]
    missing, old = versions.shortcomings(lines)
    assert missing == ["ldbfr-no-such-package"]
    assert old == [f"numpy {metadata.version('numpy')}, expected >=999"]
    found = versions.judge_base(lines)
    assert found.status == "problem"
    assert "ldbfr-no-such-package is missing" in found.what
    extras = by_name(list(versions.judge_extras({"old": lines[:2], "absent": [lines[2]], "here": lines[:1]})))
    assert extras["extra old"].status == "problem"
    assert extras["extras"].what == "here: here; not here: absent"


def test_an_installed_ldbfr_states_the_same_needs_as_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    from_checkout = versions.requirements()
    monkeypatch.setattr(versions, "PROJECT_FILE", Path("/nowhere"))
    installed = versions.requirements()
    if not installed:
        pytest.skip("ldbfr is not installed here")
    assert set(installed) >= {"", "ray", "s3"}
    names = {extra: {line.name for line in lines} for extra, lines in installed.items()}
    for extra in ("ray", "s3", "serve"):
        assert names[extra] == {line.name for line in from_checkout[extra]}


def test_a_torchvision_of_another_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # how Python notes an import that must fail
    found = versions.torchvision()
    assert (found.status, "together" in found.advice) == ("problem", True)


# ---- the machine ----


def test_memory_is_the_containers_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, none = tmp_path / "memory.max", tmp_path / "none"
    limit.write_text(f"{3 * GIB}\n")
    none.write_text("max\n")
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (str(none), str(limit), str(tmp_path / "missing")))
    assert machine.memory_bytes() == 3 * GIB
    assert machine.judge_memory(3 * GIB, 2).status == "warning"
    assert machine.judge_memory(16 * GIB, 2).status == "ok"


@pytest.mark.parametrize(
    ("free", "total", "status"),
    [(0.5, 100, "problem"), (5, 100, "warning"), (40, 100, "ok"), (40, 1000, "warning"), (60, 1000, "ok")],
)
def test_disks(free: float, total: float, status: str) -> None:
    found = machine.judge_disk("disk", Path("/data"), int(free * GIB), int(total * GIB))
    assert found.status == status
    assert f"{free:.1f} GiB of {total:.1f} GiB free at /data" in found.what
    assert_advised([found])


def test_docker_s_own_shared_memory_is_too_small_for_ray() -> None:
    assert machine.judge_shared_memory(64 * 2**20).status == "warning"
    assert machine.judge_shared_memory(8 * GIB).status == "ok"
    assert machine.judge_open_files(1_024).status == "warning"
    assert machine.judge_open_files(1_048_576).status == "ok"


def test_a_folder_that_is_yet_to_be_made_lies_on_the_disk_of_the_one_above(tmp_path: Path) -> None:
    assert machine.existing(tmp_path / "a" / "b") == tmp_path
    assert machine.existing(tmp_path) == tmp_path


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LDBFR_CACHE", str(tmp_path / "cache"))
    found = by_name(list(machine.check_machine()))
    assert {"memory", "disk: cache", "disk: temporary"} <= set(found)
    assert str(tmp_path) in found["disk: cache"].what
    assert not (tmp_path / "cache").exists()


H100 = Gpu("H100", 80 * GIB, 79 * GIB, (9, 0), bf16=True)


def gpus(*cards: Gpu, **facts: Any) -> GpuFacts:
    return GpuFacts(cards, **{"build": "13.0", "driver": "580.65", **facts})


@pytest.mark.parametrize(
    ("facts", "needed", "status", "text"),
    [
        (gpus(driver=""), 0, "ok", "everything runs on the CPU"),
        (gpus(build=""), 0, "problem", "this torch is a CPU build"),
        (gpus(), 0, "problem", "torch for CUDA 13.0 cannot use it"),
        (gpus(hidden=""), 0, "warning", "hides all of them"),
        (gpus(H100), 0, "ok", "bf16"),
        (gpus(H100), 51 * GIB, "ok", "training takes 51.0 GiB"),
        (gpus(H100), 90 * GIB, "problem", "training takes 90.0 GiB"),
        (gpus(Gpu("H100", 80 * GIB, 20 * GIB, (9, 0), True)), 0, "warning", "20.0 GiB of 80.0 GiB free"),
        (gpus(Gpu("V100", 32 * GIB, 31 * GIB, (7, 0), False)), 0, "warning", "without bfloat16"),
        (gpus(Gpu("K80", 12 * GIB, 0, (3, 7), False, "no kernel image is available")), 0, "problem", "no kernel"),
    ],
)
def test_gpus(facts: GpuFacts, needed: int, status: str, text: str) -> None:
    (found,) = judge_gpus(facts, needed, "training")
    assert (found.status, text in found.what) == (status, True), found
    assert_advised([found])


def test_the_gpus_of_this_machine_are_looked_at() -> None:
    facts = machine.gpu_facts()
    assert all(gpu.total > 0 for gpu in facts.gpus)
    assert_advised(list(judge_gpus(facts)))


# ---- weights ----


def test_weights_that_come_along_are_whole() -> None:
    found = models.check_weights("faces_64")
    assert found.status == "ok"
    assert str(PRETRAINED_FOLDER) in found.what


def test_damaged_and_missing_weights_are_named(tmp_path: Path) -> None:
    tiny.new_pipeline().save_pretrained(tmp_path / "weights")
    file = tmp_path / "weights" / "unet" / "diffusion_pytorch_model.safetensors"
    assert models.check_weights(str(tmp_path / "weights")).status == "ok"
    tiny.flip_byte(file, -1)
    found = models.check_weights(str(tmp_path / "weights"))
    assert (found.status, str(file) in found.what) == ("problem", True)
    assert "faces_128" in models.check_weights("no-such-weights").what


def test_the_detector_is_looked_for_but_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDBFR_CACHE", str(tmp_path))
    monkeypatch.delenv(DETECTOR_FILE.variable, raising=False)
    monkeypatch.delenv("LDBFR_OFFLINE", raising=False)
    found = models.check_detector()
    assert (found.status, DETECTOR_FILE.url in found.advice) == ("warning", True)
    monkeypatch.setenv("LDBFR_OFFLINE", "1")
    assert models.check_detector().status == "problem"
    (tmp_path / DETECTOR_FILE.name).write_bytes(b"half of it")
    assert "not the published file" in models.check_detector().what
    monkeypatch.setenv(DETECTOR_FILE.variable, str(tmp_path / DETECTOR_FILE.name))
    found = models.check_detector()
    assert (found.status, DETECTOR_FILE.variable in found.advice) == ("problem", True)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_real_detector_is_fine(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DETECTOR_FILE.variable, str(shared_data / "weights" / DETECTOR_FILE.name))
    assert models.check_detector().status == "ok"


def test_what_a_training_needs_is_what_its_plan_says() -> None:
    need, what_for = models.training_need("tiny")
    stage = what_for.split()[1]
    assert need == int(plan_stage(tiny.preset(), stage, (1, 1)).workers[0].memory.total)
    with pytest.raises(ConfigError, match="no preset 'tin'"):
        models.training_need("tin")


# ---- places ----

NAMES = [right.name for right in places.RIGHTS]


def statuses(place: str) -> dict[str, str]:
    """Of every right there."""
    found = list(places.check_place(place))
    assert_advised(found)
    return {row.name.removeprefix(f"{place}: "): row.status for row in found}


def test_a_folder_allows_everything_and_is_left_as_it_was(tmp_path: Path) -> None:
    assert statuses(str(tmp_path)) == dict.fromkeys(NAMES, "ok")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    (found,) = places.check_place(str(tmp_path / "missing"))
    assert (found.status, found.what) == ("problem", "there is no such folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.s3
def test_a_bucket_allows_everything_and_is_left_as_it_was(s3_root: str) -> None:
    assert statuses(s3_root) == dict.fromkeys(NAMES, "ok")
    assert not list(storage.list_objects(s3_root))


@pytest.mark.s3
@pytest.mark.parametrize(
    ("method", "path", "refused", "action"),
    [
        ("DELETE", "probe", ["delete"], "s3:DeleteObject"),
        ("GET", "list-type=2", ["list"], "s3:ListBucket"),
        ("GET", "/probe", ["read", "read a range", "overwrite"], "s3:GetObject"),
    ],
)
def test_a_right_that_a_bucket_refuses_is_named(
    faulty_s3: FaultyProxy, s3_root: str, method: str, path: str, refused: list[str], action: str
) -> None:
    faulty_s3.fail(status=403, method=method, path=path)
    found = by_name(list(places.check_place(s3_root)))
    wrong = [name.removeprefix(f"{s3_root}: ") for name, row in found.items() if row.status == "problem"]
    assert wrong == refused
    assert action in found[f"{s3_root}: {refused[0]}"].advice
    assert "access denied" in found[f"{s3_root}: {refused[0]}"].what


@pytest.mark.s3
def test_a_bucket_that_takes_nothing_is_only_listed(faulty_s3: FaultyProxy, s3_root: str) -> None:
    faulty_s3.fail(status=403, method="PUT")
    assert statuses(s3_root) == {"create once": "problem", "list": "ok"}


@pytest.mark.s3
def test_a_server_without_conditional_writes_is_found_out(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(uri: str, data: bytes) -> bool:
        storage.write_bytes(uri, data)
        return True

    monkeypatch.setattr(storage, "create_bytes", careless)
    found = by_name(list(places.check_place(s3_root)))
    assert "ignores If-None-Match" in found[f"{s3_root}: create once"].what


@pytest.mark.s3
def test_inputs_are_only_listed_and_read(faulty_s3: FaultyProxy, s3_root: str) -> None:
    (found,) = places.check_readable(s3_root)
    assert (found.status, found.what) == ("problem", "nothing is there")
    storage.write_bytes(f"{s3_root}/a.png", b"short")
    storage.write_bytes(f"{s3_root}/empty.png", b"")
    faulty_s3.requests.clear()
    assert [row.status for row in places.check_readable(s3_root)] == ["ok", "ok"]
    assert {method for method, _ in faulty_s3.requests} == {"GET"}
    assert [row.status for row in places.check_readable(f"{s3_root}/empty.png")] == ["ok", "ok"]
    faulty_s3.fail(status=403, path="/a.png")
    assert [row.status for row in places.check_readable(s3_root)] == ["ok", "problem"]
    faulty_s3.fail(status=403)
    (found,) = places.check_readable(s3_root)
    assert "s3:ListBucket" in found.advice


@pytest.mark.s3
def test_a_bucket_that_is_not_there(s3_endpoint: str) -> None:
    found = list(places.check_place("s3://ldbfr-no-such-bucket/runs"))
    assert {row.status for row in found} == {"problem"}
    assert "there is no such bucket" in found[0].what


# ---- addresses ----


@contextmanager
def answering(answers: dict[str, tuple[int, str]], token: str = "") -> Iterator[str]:
    """A server with a status and a text for every path; it may want a token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answers.get(self.path, (404, "not here"))
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                status, text = 401, "unauthorized"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("answers", "status", "text"),
    [
        ({"/healthz": (200, "{}"), "/readyz": (200, "{}")}, "ok", "alive and ready"),
        ({"/healthz": (200, "{}"), "/readyz": (503, "no model")}, "problem", "no model"),
        ({}, "problem", "/healthz answers 404"),
    ],
)
def test_endpoints(answers: dict[str, tuple[int, str]], status: str, text: str) -> None:
    with answering(answers) as url:
        found = list(addresses.check_server(f"{url}/"))
    assert [row.status for row in found] == [status]
    assert text in found[0].what
    assert_advised(found)


def test_nobody_there_is_a_finding_and_no_error() -> None:
    for check in (addresses.check_server, addresses.check_cluster):
        (found,) = check("http://127.0.0.1:9")
        assert (found.status, "no answer" in found.what) == ("problem", True)
        assert_advised([found])


def test_an_endpoint_without_tls_is_warned_of_beyond_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "get", lambda url: (200, "{}"))
    status = {
        url: [row.status for row in addresses.check_server(url)] for url in ("http://a.example", "https://a.example")
    }
    assert status == {"http://a.example": ["ok", "warning"], "https://a.example": ["ok"]}


def test_clusters_and_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    version = json.dumps({"version": "4", "ray_version": metadata.version("ray")})
    with answering({"/api/version": (200, version)}, token="secret") as url:
        (found,) = addresses.check_cluster(url)
        assert (found.status, "wants a token" in found.what) == ("problem", True)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
        (found,) = addresses.check_cluster(url)
        assert "RAY_AUTH_TOKEN is not its token" in found.what
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
        found, how = addresses.check_cluster(url)
        assert (found.status, how.status) == ("ok", "ok")
        assert f"ray job submit --address {url} --working-dir . -- python jobs/doctor.py" in how.what
    with answering({"/api/version": (200, "<html>")}) as url:
        (found,) = addresses.check_cluster(url)
        assert "no version of Ray" in found.what
    assert addresses.judge_versions("cluster", "1.0").status == "warning"
    (found,) = addresses.check_cluster("10.0.0.1:6379")
    assert found.status == "problem"


# ---- clusters ----


def report(**changes: Any) -> NodeReport:
    facts: dict[str, Any] = {"findings": (ok("weights", "whole"),), "versions": {"ray": "2.60", "torch": "2.15"}}
    return NodeReport(**{**facts, "gpus": 1, "gpus_declared": 1.0, "clock": 0.0, "uncertainty": 0.01, **changes})


def test_equal_nodes_are_well() -> None:
    found = by_name(judge_cluster({"a": report(), "b": report(clock=1.0)}, {}))
    assert {row.status for row in found.values()} == {"ok"}
    assert set(found) == {"versions", "clocks", "GPUs", "weights, all 2 nodes"}


@pytest.mark.parametrize(
    ("changes", "name", "status", "text"),
    [
        ({"versions": {"ray": "2.60", "torch": "2.11"}}, "versions: torch", "problem", "c has 2.11"),
        ({"versions": {"ray": "2.60"}}, "versions: torch", "problem", "c has none"),
        ({"clock": -5.0}, "clock, c", "warning", "-5.0 s"),
        ({"clock": 900.0}, "clock, c", "problem", "+900.0 s"),
        ({"gpus": 0}, "GPUs, c", "problem", "Ray hands out 1, torch can use 0"),
        ({"gpus_declared": 0.0}, "GPUs, c", "warning", "Ray hands out 0"),
        ({"findings": (problem("weights", "gone", "copy"),)}, "weights, c", "problem", "gone"),
    ],
)
def test_a_node_that_differs_is_named(changes: dict[str, Any], name: str, status: str, text: str) -> None:
    found = by_name(judge_cluster({"a": report(), "b": report(), "c": report(**changes)}, {}))
    assert (found[name].status, text in found[name].what) == (status, True), found
    assert_advised(list(found.values()))


def test_a_clock_that_cannot_be_told_to_be_off_is_not_blamed() -> None:
    assert all(row.status == "ok" for row in judge_cluster({"a": report(clock=4.0, uncertainty=3.0)}, {}))


def test_silence_is_a_finding() -> None:
    (found,) = judge_cluster({}, {"a": "nothing within 120 s"})
    assert (found.name, found.status) == ("node a", "problem")


@pytest.mark.ray
def test_the_job_looks_at_every_node(
    ray_cluster: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from jobs import doctor

    tiny.new_pipeline().save_pretrained(tmp_path / "weights")
    code = doctor.main(["--weights", str(tmp_path / "weights"), "--storage", str(tmp_path), "--json"])
    out = capsys.readouterr().out
    found = by_name([Finding(**row) for row in json.loads(out)])
    assert code == 0, out
    assert found["versions"].what.startswith("the same on 1 node(s)")
    assert f"{tmp_path}: delete, all 1 nodes" in found
    assert found["weights, all 1 nodes"].status == "ok"
    assert found["clocks"].status == "ok"

    assert doctor.main(["--weights", "no-such-weights"]) == 1
    assert "problem  weights, all 1 nodes" in capsys.readouterr().out
    assert doctor.main(["--preset", "no-such-preset"]) == 2
    assert "no preset 'no-such-preset'" in capsys.readouterr().err


# ---- the command ----


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ldbfr", "doctor", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(monkeypatch, "--weights", "faces_64", "--storage", str(tmp_path), "--preset", "tiny", "--json") == 0
    found = by_name([Finding(**row) for row in json.loads(capsys.readouterr().out)])
    assert_advised(list(found.values()))
    assert {"python", "weights", f"{tmp_path}: delete"} <= set(found)
    assert run(monkeypatch, "--weights", "no-such-weights") == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("problem  weights ") for line in lines) == 1
    assert lines[-1].endswith("1 problem")
    assert str(REPOSITORY) not in lines[0]
