#!/usr/bin/env bash
# Installs ldbfr and what its jobs and its endpoint need into a new virtual environment, as the image has it.
#
#     cluster/install.sh VENV [PYTHON]        from the root of a checkout
#
# The Dockerfile runs this file, and tests/test_cluster_image.py runs it too, so what is built elsewhere is tested here.
# Wheels alone are taken, so that no compiler is needed; one package exists as pure Python source only.
set -euo pipefail

venv=${1:?usage: cluster/install.sh VENV [PYTHON]}
python=${2:-python3}
extras=ray,serve,data,s3,lpips,identity,metrics,launcher

"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check --constraint constraints.txt uv
"$venv/bin/uv" pip install --python "$venv/bin/python" --compile-bytecode \
    --constraints constraints.txt --build-constraints constraints.txt \
    --only-binary :all: --no-binary ldbfr,face-recognition-models ".[$extras]"
"$venv/bin/uv" pip uninstall --quiet --python "$venv/bin/python" uv pip

# What cannot be imported here will not be importable in the image.
"$venv/bin/python" - << 'END'
import cv2, dlib, lpips, pyarrow, ray.data, ray.serve, ray.train, torch  # noqa: E401

import ldbfr

print(f"ldbfr {ldbfr.__version__}, ray {ray.__version__}, torch {torch.__version__}")
END
