"""Keeps results of evaluations beside the benchmarks', and writes their tables into the documentation.

    python benchmarks/evaluation_docs.py keep evaluations/val-128/results.json --name evaluation-faces_128-val
    python benchmarks/evaluation_docs.py write

`keep` copies a results.json without the places of the machine that made it, to benchmarks/results/NAME.json, with the
choice of a step budget where there is one beside it. `write` fills what stands between markers in the documents:

    <!-- table evaluation-faces_128-val mild -->   scores of a split; "; "-separated restorers may follow
    <!-- reason step-budget-faces_128 -->          which default follows, and why
    <!-- speed evaluation-speed -->                how fast benchmarks/evaluation.py measured
    <!-- end -->

A test holds the documents against the results.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

import tyro

from ldbfr.errors import InputError
from ldbfr.evaluation.report_markdown import scores_table
from ldbfr.evaluation.results import Results

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
DOCUMENTS = ("docs/evaluation.md", "ldbfr/pretrained/faces_128/README.md")
MARKER = re.compile(r"<!-- (table|reason|speed) (\S+) ?([^\n]*?) ?-->\n.*?<!-- end -->", re.DOTALL)
_PLACES = re.compile(r"(?<![\w.])(/[\w.@+-]+){2,}/?")
"""Absolute paths."""


@dataclass(frozen=True)
class Keep:
    """Copy results without the places of this machine."""

    source: Annotated[Path, tyro.conf.Positional]
    """A results.json."""
    name: str
    """Of the file in benchmarks/results, without suffix."""

    def __call__(self) -> None:
        """Copy."""
        kept = without_places(json.loads(self.source.read_text("utf-8")))
        choice = self.source.parent / "choice.json"
        if choice.is_file():
            kept["settings"]["choice"] = json.loads(choice.read_text("utf-8"))
        Results.model_validate(kept)
        (RESULTS / f"{self.name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")


@dataclass(frozen=True)
class Write:
    """Fill the tables of the documents."""

    def __call__(self) -> None:
        """Write those that change."""
        for name in DOCUMENTS:
            path = REPOSITORY / name
            path.write_text(filled(path.read_text("utf-8")), "utf-8")


def without_places(value: Any) -> Any:
    """The same without keys that are places, and with absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {key: without_places(one) for key, one in value.items() if key not in ("place", "folder")}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    if isinstance(value, str) and "://" not in value:
        return _PLACES.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], value)
    if isinstance(value, str):  # an address of a download stays what it is
        words = (word if "://" in word else without_places(word) for word in value.split(" "))
        return " ".join(words)
    return value


def filled(text: str) -> str:
    """A document with every marked part as the results have it.

    Raises:
        InputError: the results that a marker names are not there.
    """
    return MARKER.sub(
        lambda found: f"{found[0].partition(chr(10))[0]}\n\n{part(*found.groups())}\n\n<!-- end -->", text
    )


def part(kind: str, name: str, rest: str) -> str:
    """What stands between a marker and its end."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise InputError(f"{path} is not there: make it with `python benchmarks/evaluation_docs.py keep`")
    if kind == "speed":
        return speed(json.loads(path.read_text("utf-8")))
    results = Results.model_validate_json(path.read_text("utf-8"))
    if kind == "reason":
        return str(results.settings["choice"]["reason"])
    split, _, only = rest.partition(" ")
    return scores_table(results, split, only.split("; ") if only else ())


def speed(found: dict[str, Any]) -> str:
    """What benchmarks/evaluation.py measured, in a sentence."""
    many, few, machine = found["all"], found["few"], found["machine"]
    return (
        f"{found['what']}, on {machine['cores']} cores ({machine['cpu']}): {many['seconds'] / 60:.1f} minutes, "
        f"{found['milliseconds a pair']:.0f} ms a pair. Peak memory of all processes {many['peak MiB']:,.0f} MiB, "
        f"{found['peak memory of all, as a share of few']:.2f} times that of {few['pairs']:,} pairs."
    )


def main() -> None:
    """Do what was asked for."""
    tyro.cli(Keep | Write, prog="evaluation_docs.py")()


if __name__ == "__main__":
    main()
