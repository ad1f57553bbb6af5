"""docs/operations.md has the tables that the benchmarks' files give, and commands that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import tyro

from benchmarks import sizing
from jobs import doctor, restore
from ldbfr.doctor.command import Doctor
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "operations.md"
TEXT = PAGE.read_text("utf-8")
RESULTS = REPOSITORY / "benchmarks" / "results"


def numbers(value: Any) -> list[float]:
    """Every number in a file of results."""
    if isinstance(value, dict | list):
        return [number for one in (value.values() if isinstance(value, dict) else value) for number in numbers(one)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_the_tables_are_those_of_the_benchmarks() -> None:
    assert sizing.with_tables(TEXT, sizing.tables(RESULTS)) == TEXT, "run python benchmarks/sizing.py"


def test_rates_follow_from_the_files() -> None:
    found = sizing.load(RESULTS)
    for rate in sizing.rates(found):
        known = numbers(found[rate.source.removesuffix(".json")])
        parts = {rate.per_second, *((1 / rate.per_second,) if rate.unit == "images" else ())}
        assert rate.unit == "photos" or any(part == pytest.approx(one) for part in parts for one in known)
        units = 1 if rate.on_gpu else rate.machine["cores"]
        assert rate.hours(10**6) * units * rate.per_hour == pytest.approx(10**6 * units)
        assert rate.hours(10**9) == pytest.approx(1000 * rate.hours(10**6))


def test_a_measurement_that_comes_later_has_its_row(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    gpu = json.loads((RESULTS / "gpu.json").read_text("utf-8"))
    gpu["inference"] = {"bf16, batch 16": {"images per second": 20.0, "seconds per image": 0.05}}
    (tmp_path / "results" / "gpu.json").write_text(json.dumps(gpu))
    load = {"machine": {"cpu": "c", "cores": 4}, "weights": "w", "steps": 8, "endpoint at saturation, images/s": 8.0}
    (tmp_path / "results" / "endpoint.json").write_text(json.dumps({"load": load}))
    text = sizing.tables(tmp_path / "results", (0.5, 3.0))
    assert "GPU: 72,000 images | 13.9 GPU-hours, 42 in money" in text
    assert "core: 7,200 images | 139 core-hours, 69 in money" in text
    assert "Not measured yet" not in text


@pytest.mark.parametrize(
    ("value", "text"), [(0.17, "0.17"), (2.083, "2.08"), (50.2, "50.2"), (999.6, "1,000"), (19_908.0, "19,900")]
)
def test_three_digits_count(value: float, text: str) -> None:
    assert sizing.figure(value) == text


def commands() -> list[list[str]]:
    """What the page has one type, a list of words each; continued lines are one."""
    blocks = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    typed = [line.strip().removeprefix("$ ") for line in lines if line.strip().startswith("$ ")]
    return [shlex.split(line, comments=True) for line in typed]


@pytest.mark.parametrize(
    ("script", "kind"), [("jobs/restore.py", restore.Restore), ("jobs/doctor.py", doctor.Doctor), ("doctor", Doctor)]
)
def test_commands_exist(script: str, kind: type) -> None:
    found = [words[words.index(script) + 1 :] for words in commands() if script in words]
    assert found
    for arguments in found:
        assert isinstance(tyro.cli(kind, args=arguments), kind)


def test_links_lead_somewhere() -> None:
    def anchors(text: str) -> set[str]:
        lines = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        return {re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-") for line in lines}

    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        file = (PAGE.parent / path).resolve() if path else PAGE
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text("utf-8")), target


def test_what_is_not_uploaded_is_named() -> None:
    lines = (REPOSITORY / ".rayignore").read_text("utf-8").splitlines()
    for pattern in (line for line in lines if line and not line.startswith("#")):
        name = pattern.strip("/")
        assert f"`{name}`" in TEXT or f"`{name}/`" in TEXT, name
