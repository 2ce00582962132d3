# make demo   sets everything up and trains a small autoencoder with Adam and SONew
# make test   sets everything up and runs linter, formatter, type checker and tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GPU_VENV ?= .venv-gpu-compile
DEMO := demo
RUNS ?= tables
TABLES ?= autoencoder autoencoder_bfloat16
ROWS ?=
SEEDS ?= 0

.PHONY: demo test lint test-slow test-tpu-compile test-gpu-compile tpu-compile step-cost \
  table-autoencoder clean

# On a CPU XLA takes a step's workspace anew in each step. glibc gives large ones back to the system,
# whose every page is then mapped again; so it keeps them.
demo step-cost table-autoencoder: export MALLOC_ARENA_MAX := 1
demo step-cost table-autoencoder: export MALLOC_MMAP_MAX_ := 0
demo step-cost table-autoencoder: export MALLOC_TRIM_THRESHOLD_ := 8000000000

demo: $(VENV)/experiments.stamp
	rm -rf $(DEMO)
	@for run in adam sonew_diagonal sonew; do \
	  case $$run in sonew_diagonal) config="sonew.py --optimizer.band=0";; *) config="$$run.py";; esac; \
	  echo "training with $$run"; \
	  $(BIN)/python -m experiments.main --task=configs/tasks/digits.py \
	    --optimizer=configs/optimizers/$$config --workdir=$(DEMO)/$$run || exit 1; \
	done
	@$(BIN)/python -m experiments.report $(DEMO) --output=$(DEMO)/report

test: lint
	$(BIN)/python -m pytest -n auto -m "not slow and not tpu_compile and not gpu_compile"

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# PRECOND_OPTAX_TEST_DEADLINE, in seconds since the epoch: what would begin later is skipped.
test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto -m slow

# What the TPU compiler makes of a step on 256 chips; needs no TPU.
test-tpu-compile: $(VENV)/tpu-compile.stamp
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m tpu_compile -s

# What the GPU compiler makes of a step on one; needs no GPU.
test-gpu-compile: $(GPU_VENV)/gpu-compile.stamp
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(GPU_VENV)/bin/python -m pytest -m gpu_compile -s

tpu-compile: $(VENV)/tpu-compile.stamp
	JAX_PLATFORMS=cpu $(BIN)/python -m experiments.tpu_compile

# Step times beside optax.adam's.
step-cost: $(VENV)/experiments.stamp
	$(BIN)/python -m experiments.step_cost

# The papers' autoencoder table, with the committed settings: make table-autoencoder DATA=FOLDER
# [RUNS=FOLDER] [TABLES=autoencoder] [ROWS=REGEX] [SEEDS=0,1,2]; DATA is a folder with MNIST.
table-autoencoder: $(VENV)/experiments.stamp
	@test -n "$(DATA)" || { echo "give DATA=FOLDER, a folder with MNIST" >&2; exit 1; }
	@for table in $(TABLES); do \
	  $(BIN)/python -m experiments.table --table=configs/tables/$$table.py --data_dir=$(DATA) \
	    --workdir=$(RUNS)/$$table --rows='$(ROWS)' --seeds=$(SEEDS) || exit 1; \
	done

clean:
	rm -rf $(VENV) $(GPU_VENV) $(DEMO)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/experiments.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[experiments]'
	touch $@

$(VENV)/test.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[experiments,test]'
	touch $@

$(VENV)/tpu-compile.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[experiments,test,tpu-compile]'
	touch $@

# An environment of its own: with the plugin there, jax looks for a GPU whatever it is to do.
$(GPU_VENV)/gpu-compile.stamp: pyproject.toml
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --editable '.[experiments,test,gpu-compile]'
	touch $@
