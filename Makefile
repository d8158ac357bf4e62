# make quickstart   environment, then raw text to a model that influence chose the data of and GRPO made answer, and
#                   to its program for a phone (CPU)
# make test         environment, then the tests
# make lint         ruff
# make benchmark    the main benchmarks in turn; that of the paper's claims with DATA=FOLDER, as benchmarks/evidence.py says
#
# PYTHON chooses the interpreter of the environment (3.10 or newer), VENV its folder, OUTPUT the quickstart's, and
# OMP_NUM_THREADS its threads.

PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= runs/quickstart
BIN := $(VENV)/bin
ARGS ?=
TORCH_INDEX ?=
# Two where two cores are free: models as small as these gain little from more, and on a busy machine threads spend
# their time waiting for each other.
THREADS := $(shell $(PYTHON) -c 'import os; print(2 if os.cpu_count() - os.getloadavg()[0] > 1 else 1)')

.PHONY: quickstart test lint benchmark clean

# Remade when a requirement changes; pip then changes only what differs. torch comes first, so that its source can be
# chosen: PyPI's Linux build brings gigabytes of CUDA, which a machine without a GPU is spared by
#   make quickstart TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
$(VENV)/.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: PYTHON=...")'
	@$(PYTHON) -c 'import ensurepip' || { echo "venv is missing: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH_INDEX) $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $$(grep -E '^(kronfluence|executorch|optimum-executorch)==' constraints.txt)
	touch $@

quickstart: $(VENV)/.installed
	@CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} OMP_NUM_THREADS=$${OMP_NUM_THREADS-$(THREADS)} $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/quickstart.py --output-dir $(OUTPUT) $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/model_speed.py
	$(BIN)/python benchmarks/influence.py --only exactness,cost,lds,140M
	$(BIN)/python benchmarks/mixture.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/curation.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/on_device.py --folder runs/on_device
	$(BIN)/python benchmarks/on_device_retrieval.py --folder runs/on_device_retrieval
	$(if $(DATA),$(BIN)/python benchmarks/evidence.py --data $(DATA))

clean:
	rm -rf $(VENV) build *.egg-info
