# Every target sets up .venv by itself when it has to, and costs nothing extra when it does not.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
SLOW := slow
# For the tests that need no Ray and no browser; those of Ray take all cores by themselves, and go one after the other.
PROCESSES := 2
EXTRAS := ray,serve,client,data,s3,launcher,lpips,identity,metrics,mlflow,wandb,demo,test,dev

# What an active environment leaves behind must not reach ours.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV CONDA_PREFIX PIP_TARGET PIP_PREFIX UV_PYTHON UV_SYSTEM_PYTHON
export PYTHONNOUSERSITE := 1
export PIP_USER := 0

.PHONY: help demo test test-slow check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## restore degraded faces on this machine and write the results to demo-output/
	@$(PYTHON) jobs/demo.py --output demo-output

test: $(READY) ## the quick suite, Ray and S3 included
	@status=0; \
	$(PYTHON) -m pytest -m "not slow and not ray and not browser" -n $(PROCESSES) --dist loadfile || status=1; \
	$(PYTHON) -m pytest -m "not slow and (ray or browser)" || status=1; \
	exit $$status

test-slow: $(READY) ## the tests that take minutes
	@$(PYTHON) -m pytest -m "$(SLOW)"

check: $(READY) ## lint, formatting, types, layers
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports

clean: ## remove the environment, the caches and what the demo wrote
	rm -rf $(VENV) demo-output build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ------------------------------------------------------------------------------------------------------------- set-up
# The stamp is written last, so an interrupted set-up is taken up again; the lock makes a second make wait for the first.
# (The lock is not $(VENV)/.lock: uv takes that one itself, and would wait five minutes for us to let go of it.)
# $(VENV)/.installing outlives only a set-up that was killed: the next one then starts from an empty folder.

define SET_UP
works() { "$$1" -c 'import sys, venv, ensurepip, fcntl; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; }
base=
for candidate in python3.13 python3.12 python3.11 python3; do
    if works "$$candidate"; then base=$$candidate; break; fi
done
if [ -z "$$base" ]; then
    echo "set-up: found no working Python 3.11 or newer with the venv module (tried python3.13, python3.12, python3.11" >&2
    echo "        and python3 on PATH). Install one (on Debian or Ubuntu: apt-get install python3 python3-venv) and run make again." >&2
    exit 1
fi

mkdir -p $(VENV)
exec 9> $(VENV)/.set-up-lock
"$$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2> /dev/null || {
    echo "set-up: another make is setting up $(VENV); waiting for it"
    "$$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
}
if [ $(READY) -nt pyproject.toml ] && [ $(READY) -nt constraints.txt ]; then exit 0; fi

if [ -e $(VENV)/.installing ] || ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; then
    echo "set-up: creating $(VENV) with $$("$$base" --version) ($$base)"
    find $(VENV) -mindepth 1 -maxdepth 1 ! -name .set-up-lock -exec rm -rf {} +
    "$$base" -m venv $(VENV)
fi
echo "set-up: installing the packages of constraints.txt (about 6 GB; one to three minutes the first time, seconds from uv's cache)"
started=$$SECONDS
touch $(VENV)/.installing
if ! { $(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv &&
       $(VENV)/bin/uv pip install --python $(PYTHON) --constraints constraints.txt --build-constraints constraints.txt \
           --editable '.[$(EXTRAS)]'; } < /dev/null; then
    rm -f $(VENV)/.installing
    echo "set-up: the packages could not be installed, for the reason given above; nothing was marked as ready. Run make again." >&2
    exit 1
fi
rm -f $(VENV)/.installing
touch $(READY)
echo "set-up: ready after $$((SECONDS - started)) s"
endef
export SET_UP

$(READY): pyproject.toml constraints.txt
	@bash -euo pipefail -c "$$SET_UP"
