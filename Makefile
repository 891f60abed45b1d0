# Two commands: `make demo` and `make test`. Each sets up .venv by itself; the second time it is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := runtime parallel kernels predictors launch profiles tests

export PYTHONSAFEPATH := 1

.PHONY: demo test test-gpu lint typecheck clean

demo: $(VENV)/.runtime
	$(BIN)/dejavu launch demo

# Two processes, a file of tests in one of them: the Slurm cluster is there once.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# On a machine with GPUs: what CI cannot run, with its record in profiles/results/.
test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest tests/kernels -m "not gpu"
	$(BIN)/python -m pytest -m "gpu or multi_gpu" --record-results

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

typecheck: $(VENV)/.dev
	mkdir -p build/typecheck
	ln -sfn ../.. build/typecheck/dejavu
	$(BIN)/mypy $(addprefix build/typecheck/dejavu/,runtime parallel kernels predictors launch profiles)

clean:
	rm -rf $(VENV) build *.egg-info

# torch first and alone: what follows then finds its requirement met and brings no second build of it.
# `touch` comes last, so an interrupted set-up starts again.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dejavu needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) --editable '.[dev,baselines]'
	touch $@
