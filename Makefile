# Each word here is one chore; `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
PIP_CONSTRAINT ?= $(CURDIR)/.ci/constraints.txt
export PIP_CONSTRAINT
RUN := .venv/bin/python

.PHONY: demo test check bench env clean

demo: .venv/ready
	$(RUN) -m experiments run embedded.demo
	$(RUN) -m analysis table embedded.demo
	$(RUN) -m analysis figure embedded.demo

test: .venv/ready check
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/ready
	$(RUN) -m tests.bench
	$(RUN) -m tests.bench_retrain
	$(RUN) -m tests.bench_eval

env: .venv/ready

.venv/ready: requirements.txt requirements-dev.txt requirements-embedded.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; found $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "This Python cannot make environments: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(RUN) -m pip install --quiet --no-deps -r requirements-embedded.txt
	@$(RUN) -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "checkout.pth").write_text("$(CURDIR)\n")'
	touch $@

clean:
	rm -rf .venv
