# `make demo` and `make test` do everything on a fresh machine; they share the .venv they create.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check soak study clean

# Pip's output goes to a file; of a failure its errors are shown, in one line.
LOG := $(VENV)/install.log
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"python {sys.version.split()[0]}: mrmae needs Python >= 3.11; run make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	@echo "installing mrmae and its libraries into $(VENV): minutes the first time (tail -f $(LOG) shows how far it is)"
	@mkdir -p $(VENV)
	@{ $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --upgrade pip && $(BIN)/python -m pip install --editable '.[dev]'; } >$(LOG) 2>&1 \
	  || { echo "installing into $(VENV) failed: $$(grep -iE '^ *error' $(LOG) | tail -n 1 | grep . || tail -n 1 $(LOG)); all output is in $(LOG)" >&2; exit 1; }
	@touch $@

# make demo [IMAGES=folder] [DEMO='--quick'] [OUT=demo-output]
OUT ?= demo-output
demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(if $(IMAGES),--images '$(IMAGES)') --out '$(OUT)' $(DEMO)

# One thread per process: PyTorch's spinning workers and two test processes on two cores are many times slower.
# Modules are compiled once, also where the environment forbids to keep that: processes that tests start would do it again.
test: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak --timeout 3600
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak_cache.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak_kills.py --sweep
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak_ray.py
	$(BIN)/python benchmarks/soak_fuzz.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak_exits.py

# The study of docs/evidence.md, one thread; the same again continues. make study DATA=folder [STUDY='--only "weight-*"']
DATA ?= ../shared/data
study: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/study_mimic.py --data-root '$(DATA)' $(STUDY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
