# Every target sets itself up: `make demo` and `make test` need Python 3.11+, make and a package index, nothing else.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SOURCE := runtime loaders tests examples benchmarks proto

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint types proto format clean

help:
	@sed -n 's/^## //p' Makefile

## make setup   fill .venv (done once; again when pyproject.toml changes)
setup: $(STAMP)

# torch comes first and alone: a wider range, or another package's wish, would bring several gigabytes of CUDA libraries.
# caikit-tgis-backend is the published TGIS client that the API tests speak with; only its generated stubs are used,
# and the framework it would pull in holds protobuf below 7, so it is installed without its dependencies.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Graft needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "Filling $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install -qq --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "caikit-tgis-backend==0.1.39"
	@touch $(STAMP)

## make demo    one server, several adapters, 64 concurrent requests, a table
demo: $(STAMP)
	$(BIN)/graft demo

## make demo-adapters   train the six adapters of the demo anew (minutes; writes runtime/demo/adapters/)
.PHONY: demo-adapters
demo-adapters: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python examples/train_demo_adapters.py

## make test    lint, types and all tests that need no accelerator
test: lint types
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(PYTEST_ARGS)

## make test-history   a storm of 33,000 requests and hundreds of replacements, checked (minutes; writes benchmarks/results/)
.PHONY: test-history
test-history: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m history -s tests/history $(PYTEST_ARGS)

# The tests of the Ascend back-end have an environment of their own: where CANN is absent, a visible torch_npu breaks the
# import of other packages (transformers among them). pip and not uv, torch first: see above.
NPU_VENV  := .venv-npu
NPU_BIN   := $(NPU_VENV)/bin
NPU_STUBS := build/cann-stubs
$(NPU_VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Graft needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "Filling $(NPU_VENV): a few minutes, once"
	$(PYTHON) -m venv $(NPU_VENV)
	$(NPU_BIN)/python -m pip install --quiet --upgrade pip
	$(NPU_BIN)/python -m pip install --quiet "torch>=2.13,<2.14"
	$(NPU_BIN)/python -m pip install --quiet "torch_npu==2.13.0" "numpy>=2.0" "safetensors>=0.6" tokenizers "msgpack>=1.1" \
		"tqdm>=4.66" "pyyaml>=6.0" "prometheus-client>=0.21" "llguidance>=1.9.1,<2" \
		"pytest>=9.0" "pytest-asyncio>=1.3" "pytest-timeout>=2.4"
	$(NPU_BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(NPU_STUBS)/.built: $(NPU_VENV)/.installed tests/npu/bench/stubs.py
	$(NPU_BIN)/python -m tests.npu.bench.stubs $(NPU_STUBS)
	@touch $@

# LD_LIBRARY_PATH is absolute, since some tests start processes elsewhere; the options replace those that leave tests/npu out.
## make test-npu   the Ascend back-end on the real torch_npu without an NPU (fills .venv-npu; needs gcc)
.PHONY: test-npu
test-npu: $(NPU_STUBS)/.built
	LD_LIBRARY_PATH=$(CURDIR)/$(NPU_STUBS) TORCH_DEVICE_BACKEND_AUTOLOAD=0 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(NPU_BIN)/python -m pytest -o addopts="-ra --strict-markers --strict-config --import-mode=importlib" \
		tests/npu $(PYTEST_ARGS)

## make npu-launches   launches and bytes of a step on Ascend, and predicted times (writes benchmarks/results/)
.PHONY: npu-launches
npu-launches: $(NPU_STUBS)/.built
	LD_LIBRARY_PATH=$(CURDIR)/$(NPU_STUBS) TORCH_DEVICE_BACKEND_AUTOLOAD=0 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(NPU_BIN)/python -m benchmarks.npu_launches

## make bench   decode with 8 adapters against transformers + PEFT (minutes; writes benchmarks/results/)
bench: $(STAMP)
	$(BIN)/python -m benchmarks.decode_vs_peft

## make bench-train   LoRA training against transformers + PEFT (a quarter of an hour; writes benchmarks/results/)
.PHONY: bench-train
bench-train: $(STAMP)
	$(BIN)/python -m benchmarks.train_vs_peft

## make bench-loading   steps while adapters load, cold adapters, device bytes (ten minutes; writes benchmarks/results/)
.PHONY: bench-loading
bench-loading: $(STAMP)
	$(BIN)/python -m benchmarks.steps_while_loading
	$(BIN)/python -m benchmarks.cold_adapter
	$(BIN)/python -m benchmarks.device_bytes

## make bench-many-adapters   1,000 adapters over 16 places on the device (minutes; writes benchmarks/results/)
.PHONY: bench-many-adapters
bench-many-adapters: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m benchmarks.many_adapters

## make lint    ruff over the code, buf over the contracts, and whether runtime/pb and docs/api.md follow them
lint: $(STAMP) proto-unbroken
	$(BIN)/ruff check $(SOURCE)
	$(BIN)/buf lint proto
	$(BIN)/python proto/generate.py --check
	$(BIN)/python proto/reference.py --check

# The contracts against what clients were built with: nothing is taken away or changed, and nothing is added to fmaas.
.PHONY: proto-unbroken
proto-unbroken: $(STAMP)
	$(BIN)/buf breaking proto --against proto/baseline.binpb
	$(BIN)/buf breaking proto/baseline.binpb --against proto --config proto/frozen.yaml

## make types   mypy, strict
types: $(STAMP)
	$(BIN)/mypy

## make format  let ruff mend what it can
format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCE)

## make proto   generate runtime/pb and docs/api.md from proto/
proto: $(STAMP)
	$(BIN)/python proto/generate.py
	$(BIN)/python proto/reference.py

# Only for additions to our own protos (graft/), in the change that makes them: from then on they are a promise too.
# It does not help against a break: what `make lint` refuses is refused here as well.
## make proto-baseline   renew what the protos are compared with, after an addition to graft/
.PHONY: proto-baseline
proto-baseline: proto-unbroken
	$(BIN)/buf build proto --exclude-source-info --output proto/baseline.binpb

## make clean   remove what the other targets made
clean:
	rm -rf $(VENV) $(NPU_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
