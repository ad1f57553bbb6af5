"""cluster/Dockerfile: linted, and its steps run in a plain environment, since no image is built here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def stage(name: str) -> str:
    """The lines of a stage."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    (found,) = [text for text in stages if text.splitlines()[0].endswith(f"AS {name}")]
    return found


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("this test needs hadolint (the extra test has it)")
    done = subprocess.run([hadolint, str(CLUSTER / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_what_runs_is_not_root_and_has_no_compiler() -> None:
    runtime = stage("runtime")
    users = re.findall(r"^USER (\S+)", runtime, re.M)
    assert users[-1] == "10001:10001"
    assert re.findall(r"^USER (\S+)", stage("launcher"), re.M)[-1] == "10001:10001"
    for tool in ("gcc", "g++", "build-essential", "clang", "python3-dev", "devel"):
        assert tool not in DOCKERFILE
    assert "ca-certificates" in runtime, "without them Python trusts no server"
    assert DOCKERFILE.rstrip().endswith("FROM runtime"), "what is built without --target"


def test_every_copied_path_is_there_and_travels_to_the_builder() -> None:
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M):
        for source in line.split()[:-1]:
            assert (REPOSITORY / source).exists(), source
            assert f"!{source}" in ignored, f"{source} does not travel"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_its_steps_make_an_environment_in_which_everything_runs(tmp_path: Path) -> None:
    """install.sh, then the layout that the Dockerfile copies, with that environment's commands and no other package."""
    assert "RUN cluster/install.sh /opt/ldbfr/venv" in DOCKERFILE
    source, image = tmp_path / "src", tmp_path / "image"
    source.mkdir()
    for line in re.findall(r"^COPY (?!--from)(.+)$", stage("build"), re.M):
        for name in line.split()[:-1]:
            target = source / name
            target.parent.mkdir(exist_ok=True)
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            copy(REPOSITORY / name, target)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_", "VIRTUAL"))
    }
    command = ["bash", str(source / "cluster" / "install.sh"), str(image / "venv"), sys.base_prefix + "/bin/python3"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^ldbfr \S+, ray 2\.60\.\d+, torch ", done.stdout, re.M)

    for folder in ("jobs", "serve"):
        shutil.copytree(REPOSITORY / folder, image / folder, ignore=shutil.ignore_patterns("__pycache__"))
    inside = {**environment, "PATH": f"{image}/venv/bin:/usr/bin:/bin", "PYTHONPATH": str(image), "HOME": str(tmp_path)}
    for words in (
        ["ldbfr", "--help"],
        ["ray", "--version"],
        ["serve", "--help"],
        ["python", "jobs/train.py", "--help"],
        ["python", "jobs/prepare.py", "--help"],
        ["python", "jobs/restore.py", "--help"],
        ["python", "-c", "import serve.app, jobs.train_worker, jobs.restore_flow, ldbfr; print(ldbfr.__file__)"],
    ):
        ran = subprocess.run(words, cwd=image, env=inside, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, f"{words}: {ran.stderr}"
    assert ran.stdout.startswith(str(image / "venv")), "the library is the installed one, not the checkout's"
    assert not list((image / "venv" / "bin").glob("pip*")), "nothing is installed into a running image"
    shutil.rmtree(image)  # 7 GB, which pytest would keep
