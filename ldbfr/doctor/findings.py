"""What a check found, and how a person or a program reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

Status = Literal["ok", "warning", "problem"]

SEVERITY: dict[Status, int] = {"ok": 0, "warning": 1, "problem": 2}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: what was looked at.
        status: "warning" works, but not as it should; "problem" does not work.
        what: what was found, with numbers.
        advice: what to do about it; "" where there is nothing to do.
    """

    name: str
    status: Status
    what: str
    advice: str = ""

    def line(self, width: int) -> str:
        """As a line of a table, whose names take so many characters."""
        text = " ".join(self.what.split())
        return f"{self.status:<8} {self.name:<{width}}  {text}" + (f" -> {self.advice}" if self.advice else "")


def ok(name: str, what: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", what)


def warning(name: str, what: str, advice: str) -> Finding:
    """It works, but not as it should."""
    return Finding(name, "warning", what, advice)


def problem(name: str, what: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(name, "problem", what, advice)


def as_table(findings: Sequence[Finding]) -> str:
    """A line for each, and one that counts them."""
    width = max((len(finding.name) for finding in findings), default=0)
    return "\n".join([*(finding.line(width) for finding in findings), count(findings)])


def count(findings: Sequence[Finding]) -> str:
    """How many of each kind."""
    number = {status: sum(finding.status == status for finding in findings) for status in SEVERITY}
    text = f"{len(findings)} checks: {number['ok']} ok"
    for status in ("warning", "problem"):
        if number[status]:
            text += f", {number[status]} {status}{'s' if number[status] > 1 else ''}"
    return text


def as_json(findings: Sequence[Finding]) -> str:
    """A list of objects with the fields of `Finding`."""
    return json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if there is a problem."""
    return int(any(finding.status == "problem" for finding in findings))


def merged(by_node: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """The findings of several machines: one line for what all have in common, else one for each, named after it."""
    nodes = list(by_node)
    names = list(dict.fromkeys(finding.name for findings in by_node.values() for finding in findings))
    result = []
    for name in names:
        found = {node: [one for one in by_node[node] if one.name == name] for node in nodes}
        first = found[nodes[0]]
        if all(there == first for there in found.values()):
            result += [replace(one, name=f"{name}, all {len(nodes)} nodes") for one in first]
        else:
            result += [replace(one, name=f"{name}, {node}") for node in nodes for one in found[node]]
    return result
