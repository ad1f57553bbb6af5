"""The numbers of docs/endpoint.md, from what benchmarks/endpoint.py measured.

python benchmarks/endpoint_table.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout will do

from benchmarks.pages import between_marks

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "endpoint.json"
PAGE = REPOSITORY / "docs" / "endpoint.md"


def row(*cells: object) -> str:
    """A row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def spread(seconds: list[float]) -> str:
    """Percentiles."""
    return " / ".join(f"{value:.2f}" for value in seconds) or "–"


def load_lines(load: dict[str, Any]) -> Iterator[str]:
    """Throughput and latencies."""
    machine = load["machine"]
    saturated = load["endpoint at saturation, images/s"]
    yield (
        f"Aligned faces, `{load['weights']}`, {load['steps']} steps, "
        f"{machine['cores']} cores ({machine['cpu']}), client on the same cores; "
        f"{load['copies of the model']} copies of the model in batches of {load['batch size']}, "
        f"deadline {load['deadline, s']:g} s:"
    )
    yield ""
    yield row("measured", "")
    yield row("---", "---")
    yield row("the pipeline in a bare loop, before and after", " and ".join(map(str, load["bare loop, images/s"])))
    yield row("the endpoint at saturation, images/s", saturated)
    yield row("of the bare loop", f"**{load['endpoint at saturation / bare loop']:.0%}**")
    first = load["time to the first preview, s, p50 and p95"]
    yield row("time to the first preview, p50 / p95, s", spread(first))
    yield row("from the command to the first answer, s", load["from the command to the first answer, s"])
    yield ""
    yield row("load, of that", "asked/s", "answers", "late", "p50 / p95 / p99, s", "refused in, p50 / p95, s", "lost")
    yield row(*["---"] * 7)
    for share, found in load["open loop, by share of that"].items():
        answers = ", ".join(f"{count} × {status}" for status, count in sorted(found["answers"].items()))
        late = found["answers"].get("504", 0) + found["accepted, but after the deadline"]
        own = spread(found["accepted: p50, p95, p99, s"]), spread(found["refused: p50, p95, s"])
        yield row(f"{share} ×", found["requests/s"], answers, late, *own, found["without an answer"])


def scaling_lines(scaling: dict[str, Any]) -> Iterator[str]:
    """How copies come and go."""
    begun, ended = scaling["load from and to, s"]
    counts = ", ".join(
        f"{count} from second {second:g}" for second, count in scaling["processes of the model, from second"]
    )
    first, last = scaling["images/s in the first and the last quarter of the load"]
    answers = ", ".join(f"{count} × {status}" for status, count in sorted(scaling["answers"].items()))
    yield (
        f"Scaling, with load from second {begun:g} to {ended:g}: copies of the model {counts}; {first} images/s in the "
        f"first quarter of the load, {last} in the last; answers {answers}."
    )


def numbers(results: dict[str, Any]) -> str:
    """The text between the marks."""
    lines = [*load_lines(results["load"]), ""]
    if "scaling" in results:
        lines += [*scaling_lines(results["scaling"]), ""]
    return "\n".join(lines)


def with_numbers(page: str, text: str) -> str:
    """The page with another text between the marks."""
    return between_marks(page, "benchmarks/endpoint_table.py", text)


def main() -> None:
    """Write them."""
    text = numbers(json.loads(RESULTS.read_text("utf-8")))
    PAGE.write_text(with_numbers(PAGE.read_text("utf-8"), text), "utf-8")


if __name__ == "__main__":
    main()
