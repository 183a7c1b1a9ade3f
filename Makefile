# `make serve` and `make test` do all the set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
# Where torch comes as a CPU build; where it cannot be reached, pip takes a wheel on disk or the plain package.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TASK ?= all

BIN := .venv/bin
READY := .venv/.ready
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
GOOGLEAPIS = $(shell $(BIN)/python -c "import google.rpc, pathlib; print(pathlib.Path(google.rpc.__path__[0]).parents[1])")
PROTOC = PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I $(GOOGLEAPIS)
PROTOS := protos/rnnserve/v1/*.proto
LAST_RELEASE = $(shell git tag --list 'v*' --sort=-v:refname | head -1)

.PHONY: setup serve demo train test secrets compose-test chaos chaos-fleet bench bench-quick bench-peers bench-sequences bench-operations soak check proto clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv (once, a minute or two; torch is the large part)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) --retries 0 --timeout 10 --extra-index-url $(TORCH_INDEX) torch
	$(PIP_INSTALL) --editable '.[service,tracing,training,music,dev]'
	@touch $(READY)

serve: $(READY)  ## the server, on localhost:50051, until Ctrl-C
	$(BIN)/python -m service

demo: $(READY)  ## what the server can do, in a minute; `make serve` must run
	$(BIN)/rnnserve demo

train: $(READY)  ## `make train TASK=speaker`, or all of them
	$(BIN)/python -m models train $(TASK)

test: $(READY)
	$(BIN)/python -m pytest -n auto

secrets:  ## random ones for containers, in secrets/, where there are none yet
	sh deploy/make-secrets.sh secrets

compose-test: $(READY)  ## containers killed and drained under streams; needs Docker with compose, and root
	docker build --quiet --tag rnnserve:0.1.0 --build-arg TORCH_INDEX=$(TORCH_INDEX) $(if $(WHEELS_IMAGE),--build-arg WHEELS_IMAGE=$(WHEELS_IMAGE)) .
	$(BIN)/python -m pytest tests/scenarios/test_compose.py tests/scenarios/test_compose_scale.py

chaos: $(READY)  ## 200 crashes and other faults in the midst of streams; `make chaos SEED=7` for those of a seed
	$(BIN)/python -m tests.chaos --plans 200 $(if $(SEED),--seed $(SEED))

chaos-fleet: $(READY)  ## the same for processes: 200 on three workers, 200 on two services with Redis behind Envoy
	$(BIN)/python -m tests.chaos.fleet --on workers --plans 200 $(if $(SEED),--seed $(SEED))
	$(BIN)/python -m tests.chaos.fleet --on services --plans 200 $(if $(SEED),--seed $(SEED))

bench: $(READY)  ## streams, multiplexed sessions and sessions at rest, beside other ways; half an hour; docs/benchmarks/
	$(BIN)/python -m benchmarks --into docs/benchmarks
	$(BIN)/python -m benchmarks.at_rest --into docs/benchmarks

bench-quick: $(READY)  ## the first of these in two minutes, nothing written
	$(BIN)/python -m benchmarks --quick

bench-peers: $(READY)  ## the same load on mosec, Triton and KServe, installed in build/peers; twenty minutes; docs/benchmarks/
	$(PIP_INSTALL) --editable '.[service,tracing,training,music,dev,peers]'
	TORCH_INDEX=$(TORCH_INDEX) $(BIN)/python -m benchmarks.peers --into docs/benchmarks

bench-sequences: $(READY)  ## whole sequences beside padded and bucketed batches and on these peers; an hour; docs/benchmarks/
	$(PIP_INSTALL) --editable '.[service,tracing,training,music,dev,peers]'
	TORCH_INDEX=$(TORCH_INDEX) $(BIN)/python -m benchmarks.sequences --peers --into docs/benchmarks

bench-operations: $(READY)  ## what it costs to be seen, and every query of the dashboard; five minutes; docs/operations/
	$(BIN)/python -m benchmarks.observing --into docs/operations
	$(BIN)/python -m benchmarks.panels --into docs/operations

soak: $(READY)  ## ten minutes of sessions that come, go and die; memory, handles and file must stay flat
	$(BIN)/python -m benchmarks.soak $(if $(SECONDS),--seconds $(SECONDS))

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	@! [ -x $(BIN)/hadolint ] || $(BIN)/hadolint Dockerfile  # there is one for Linux
	@mkdir -p build/stubs
	$(PROTOC) -I protos --include_imports --include_source_info -o build/rnnserve.binpb $(PROTOS)
	$(BIN)/buf lint build/rnnserve.binpb --config buf.yaml
ifneq ($(LAST_RELEASE),)
	@rm -rf build/release && mkdir -p build/release && git archive $(LAST_RELEASE) protos | tar -x -C build/release
	$(PROTOC) -I build/release/protos --include_imports -o build/release.binpb build/release/$(PROTOS)
	$(BIN)/buf breaking build/rnnserve.binpb --against build/release.binpb --config buf.yaml
endif
	@$(MAKE) --no-print-directory stubs INTO=build/stubs
	diff --recursive --exclude __pycache__ build/stubs/rnnserve/v1 clients/rnnserve/v1

proto: $(READY)  ## write the stubs again after a change of protos/
	@$(MAKE) --no-print-directory stubs INTO=clients

.PHONY: stubs
stubs:
	@$(PROTOC) -I protos --python_out=$(INTO) --grpc_python_out=$(INTO) --mypy_out=quiet:$(INTO) --mypy_grpc_out=quiet:$(INTO) $(PROTOS)

clean:
	rm -rf .venv .state build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
