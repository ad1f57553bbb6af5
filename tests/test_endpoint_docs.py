"""docs/endpoint.md names what there is: every option, setting, problem, metric and route, and no other."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from benchmarks.endpoint_table import PAGE, RESULTS, numbers, with_numbers
from serve.api import make_app
from serve.deployment import DeploymentSettings
from serve.events import KEEP_ALIVE_SECONDS
from serve.keys import Key
from serve.observability import Metrics
from serve.problems import KINDS
from serve.protocol import RestorationOptions
from serve.settings import EndpointSettings
from tests.serving import FakeRestorer

TEXT = PAGE.read_text("utf-8")


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose head begins so."""
    table = TEXT[TEXT.index(f"\n| {head}") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def names(head: str) -> list[str]:
    """What the first column names."""
    return [name for row in rows(head) for name in re.findall(r"`([^`]+)`", row[0])]


def test_options() -> None:
    assert names("option | default") == list(RestorationOptions.model_fields)
    for name, default, *_ in rows("option | default"):
        known = RestorationOptions.model_fields[name.strip("`")].default
        if known not in (None, ()):
            assert default.strip("`") == str(known).removesuffix(".0")


def test_settings() -> None:
    assert sorted(names("setting | default")) == sorted(DeploymentSettings.model_fields)
    for first, second, *_ in rows("setting | default"):
        settings = re.findall(r"`([^`]+)`", first)
        defaults = [DeploymentSettings.model_fields[name].default for name in settings]
        if not any(default in (None, ()) for default in defaults):
            told = re.sub("[,`]", "", second).lower().split()
            assert told == [str(one).removesuffix(".0").lower() for one in defaults]


def test_problems() -> None:
    told = {row[0].strip("`"): int(row[1]) for row in rows("type, after")}
    assert told == {slug: kind.status for slug, kind in KINDS.items()}


def test_what_is_no_problem_of_ours_is_a_known_limit() -> None:
    assert "but [Serve's own](#known-limits)" in TEXT
    limits = TEXT[TEXT.index("## Known limits") :]
    assert all(name in limits for name in ("plain text", "503", "408", "`request_timeout_s`"))


def test_how_long_an_error_of_a_stream_is_an_ordinary_answer() -> None:
    words = {10.0: "ten"}
    assert f"before the first preview, if it comes within {words[KEEP_ALIVE_SECONDS]} seconds" in TEXT


def test_keys() -> None:
    assert names("field | default") == list(Key.model_fields)


def test_metrics() -> None:
    told = [name for name in names("metric | labels") if name.startswith("ldbfr_")]
    families = [family for family in Metrics().registry.collect() if family.name.startswith("ldbfr_")]
    assert told == [family.name + "_total" * (family.type == "counter") for family in families]


def test_routes() -> None:
    app = make_app(FakeRestorer(), EndpointSettings())
    told = set(re.findall(r"/[a-z0-9/{}]+", " ".join(row[0] for row in rows("route | takes")))) - {"/openapi"}
    assert told == set(app.openapi()["paths"])


def test_every_heading_that_is_linked_is_there() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings


def test_numbers_are_those_that_were_measured() -> None:
    measured = numbers(json.loads(RESULTS.read_text("utf-8")))
    assert with_numbers(TEXT, measured) == TEXT, "run `python benchmarks/endpoint_table.py`"
