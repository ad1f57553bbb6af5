"""Whether the packages that are installed are those that ldbfr was made for."""

from __future__ import annotations

import platform
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from ldbfr.doctor.findings import Finding, ok, problem, warning

PYTHON = (3, 11)
SET_UP = "run `make` in the checkout, or pip install --constraint constraints.txt 'ldbfr[{extra}]'"
PROJECT_FILE = Path(__file__).resolve().parents[2] / "pyproject.toml"
COMPARED = ("ray", "torch", "torchvision", "diffusers", "numpy", "opencv-python-headless", "pyarrow", "pillow")
"""Of which all machines of a cluster should have the same."""


def check_versions() -> Iterator[Finding]:
    """Python, the packages that ldbfr needs, its extras, and whether torch and torchvision belong together."""
    where = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < PYTHON:
        yield problem("python", where, f"install Python {'.'.join(map(str, PYTHON))} or newer")
    else:
        yield ok("python", where)
    needed = requirements()
    if not needed:
        yield warning("packages", f"no {PROJECT_FILE} and ldbfr is not installed", "pip install ldbfr")
        return
    yield judge_base(needed[""])
    yield from judge_extras({extra: lines for extra, lines in needed.items() if extra})
    yield torchvision()


def requirements() -> dict[str, list[Requirement]]:
    """What ldbfr needs, under "", and what each extra needs; from the checkout, or from the installed package."""
    if PROJECT_FILE.is_file():
        project = tomllib.loads(PROJECT_FILE.read_text("utf-8"))["project"]
        texts: dict[str, list[str]] = {"": project["dependencies"], **project["optional-dependencies"]}
        return {extra: [Requirement(text) for text in lines] for extra, lines in texts.items()}
    try:
        about = metadata.distribution("ldbfr")
    except metadata.PackageNotFoundError:
        return {}
    lines = [Requirement(text) for text in about.requires or ()]
    extras = [str(name) for name in about.metadata.get_all("Provides-Extra") or ()]
    wanted = {"": [line for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})]}
    for extra in extras:
        wanted[extra] = [line for line in lines if line not in wanted[""] and of_extra(line, extra)]
    return wanted


def of_extra(line: Requirement, extra: str) -> bool:
    """Whether an extra brings a requirement."""
    return line.marker is not None and line.marker.evaluate({"extra": extra})


def shortcomings(lines: list[Requirement]) -> tuple[list[str], list[str]]:
    """What is missing, and what is too old, with the version that is there."""
    missing, old = [], []
    for line in lines:
        try:
            version = metadata.version(line.name)
        except metadata.PackageNotFoundError:
            missing.append(line.name)
            continue
        try:
            fits = line.specifier.contains(version, prereleases=True)
        except InvalidVersion:  # of a build of one's own
            continue
        if not fits:
            old.append(f"{line.name} {version}, expected {line.specifier}")
    return missing, old


def judge_base(lines: list[Requirement]) -> Finding:
    """What ldbfr cannot do without."""
    missing, old = shortcomings(lines)
    if missing or old:
        what = "; ".join([*(f"{name} is missing" for name in missing), *old])
        return problem("packages", what, SET_UP.format(extra="ray,s3"))
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "numpy"))
    return ok("packages", f"{shown} and {len(lines) - 3} more")


def judge_extras(extras: Mapping[str, list[Requirement]]) -> Iterator[Finding]:
    """Which extras are here; one of which a part is too old is a problem, one that is not here is none."""
    there, absent = [], []
    for extra, lines in extras.items():
        missing, old = shortcomings(lines)
        if old:
            yield problem(f"extra {extra}", "; ".join(old), SET_UP.format(extra=extra))
        elif missing:
            absent.append(extra)
        else:
            there.append(extra)
    text = f"here: {', '.join(there) or 'none'}"
    yield ok("extras", text + (f"; not here: {', '.join(absent)}" if absent else ""))


def torchvision() -> Finding:
    """A torchvision that was built for another torch does not import."""
    try:
        import torchvision as module
    except (ImportError, RuntimeError, OSError) as error:
        reason = f"torchvision does not import: {error}"
        return problem("torch pair", reason, "install torch and torchvision together, as constraints.txt has them")
    return ok("torch pair", f"torchvision {module.__version__} fits torch {metadata.version('torch')}")


def versions() -> dict[str, str]:
    """The versions that all machines of a cluster should share."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in COMPARED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found
