"""The library stands without ray, and importing it costs next to nothing."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

WITHOUT_RAY = """
import importlib, pkgutil, sys
from importlib.abc import MetaPathFinder

class NoRay(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "ray":
            raise ImportError("ray is not installed here")
        return None

sys.meta_path.insert(0, NoRay())

try:
    import ray
except ImportError:
    pass
else:
    sys.exit("the import of ray was meant to fail")

import ldbfr

def give_up(name):
    raise  # the error that walk_packages caught while it imported the package `name`

names = [module.name for module in pkgutil.walk_packages(ldbfr.__path__, "ldbfr.", onerror=give_up)]
for name in names:
    importlib.import_module(name)
print("\\n".join(names))
"""

HEAVY = ("torch", "torchvision", "diffusers", "cv2", "scipy", "pandas", "pyarrow", "ray", "boto3")

LOADED_BY_LDBFR = f"""
import sys
import ldbfr
print("\\n".join(name for name in {HEAVY!r} if name in sys.modules))
"""


def run_python(source: str) -> list[str]:
    """The lines that `source` prints in a fresh interpreter at the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_module_imports_without_ray() -> None:
    imported = run_python(WITHOUT_RAY)

    modules = [
        path.relative_to(REPOSITORY).with_suffix("")
        for path in (REPOSITORY / "ldbfr").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    ]
    missed = {".".join(module.parts) for module in modules} - set(imported)
    assert not missed, f"not reached from the package, is an __init__.py missing? {sorted(missed)}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert run_python(LOADED_BY_LDBFR) == []
