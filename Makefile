# Every target explains itself: `make` prints them. What needs more than a line of shell is a command of tessera-local or a script.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help run setup stop status logs env trace tour clean doctor test check security lock schemas simulate bench-start bench-bus bench-gateway chaos

# The newest suitable Python, for making the environment; everything else runs inside it.
SYSTEM_PYTHON ?= $(shell for each in python3 python3.14 python3.13 python3.12 python3.11; do "$$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$$each"; break; }; done)
VENV := .tessera/venv
BIN := $(VENV)/bin
LOCAL := $(BIN)/tessera-local
# Compiled modules lie beside the packages, also where the environment says not to write any: each start would compile all of them again.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/bytecode
SETUP = $(if $(SYSTEM_PYTHON),env -u PYTHONPYCACHEPREFIX PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=deploy/local/src $(SYSTEM_PYTHON) -m tessera.local.setup,@echo "Python 3.11 or newer is missing: install it (on Debian: python3 python3-venv). Or use \`docker compose up\`." >&2; exit 1;)

# What is asked of a platform in a checkout where nothing was ever set up.
NOTHING = @echo 'Nothing is set up here yet: `make run` does it.' >&2; exit 1
LOCALLY = $(if $(wildcard $(LOCAL)),@$(LOCAL),$(NOTHING); :)

help: ## Print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {gsub(/\$$\$$/, "$$", $$2); printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: setup ## Start everything (Kafka, Postgres, Redis, six services), then go on the tour; leaves it running
	@$(LOCAL) run

setup: ## Make or renew the Python environment from the lock file (part of run and test)
	@$(SETUP)

test: setup ## Run every test against a stack of its own (ARGS="libs/bus -k outbox" for some); leaves nothing behind
	@.ci/test $(ARGS)

doctor: ## Say what this machine is missing, and the alternative
	@$(SETUP) --doctor

stop: ## Stop everything; data stays
	$(if $(wildcard $(LOCAL)),@$(LOCAL) stop,@echo 'Nothing is running.')

status: ## Show every process, where it listens and whether it is ready
	$(LOCALLY) status

logs: ## Follow the logs (SERVICE=memory for one)
	$(LOCALLY) logs $(SERVICE)

env: ## Print shell exports for clients: eval "$$(make -s env)"
	$(LOCALLY) env

trace: ## Print the tree of spans of a request (ID=...)
	$(if $(wildcard $(LOCAL)),,$(NOTHING))
	@$(if $(ID),,echo 'Say which: make trace ID=<request id or trace id>' >&2; exit 2;) TESSERA_HOME=$${TESSERA_HOME:-.tessera} $(BIN)/python -m tessera.telemetry.trace $(ID)

tour: ## Go on the tour again; the platform must run
	$(LOCALLY) tour

clean: ## Stop and delete data, logs and secrets (ALL=yes: downloads and the Python environment too)
	@if [ -x $(LOCAL) ]; then $(LOCAL) clean $(if $(ALL),all); fi
	$(if $(ALL),@rm -rf $(VENV) .tessera/cache .tessera/setup.lock && { rmdir .tessera 2>/dev/null || true; })

check: setup ## Everything that can be said without running it: style, types, imports, locks, schemas, chart, compose, images
	@$(BIN)/python deploy/tools/check.py

security: setup ## Static analysis, a scan for secrets, known vulnerabilities of the locked dependencies
	@$(BIN)/python deploy/tools/security.py

lock: setup ## Renew requirements.lock and the lock of every image from the pyproject files
	@$(BIN)/python deploy/tools/locks.py write

schemas: setup ## Write new schema revisions, docs/events.md, docs/asyncapi.json and .env.example
	@$(BIN)/python -m tessera.contracts.schemas write
	@$(BIN)/python -m tessera.contracts.documents write
	@$(BIN)/python deploy/tools/settings_example.py write

chaos: setup ## Every fault of the matrix on a real platform under load (ARGS="--rows kill,zombie --kills 10", CHAOS_SEED=…); one JSON line last
	@PYTHONPATH=tests $(BIN)/python -m chaos $(ARGS)

simulate: setup ## Look for anomalies of the bus in worlds of its own (SEEDS=20000, from a place chosen by chance; SIMULATION_SEED=17 for one)
	@PYTHONPATH=tests $(BIN)/python -m simulation $(if $(SEEDS),--seeds $(SEEDS))

bench-bus: setup ## Measure the bus beside its floors (about six minutes); one JSON line last
	@PYTHONPATH=tests/bench $(BIN)/python tests/bench/bus

bench-gateway: setup ## Measure chats beside LiteLLM, a bare forwarder and the raw path (about 26 minutes; ARGS=--quick to try it); one JSON line last
	@PYTHONPATH=tests/bench $(BIN)/python tests/bench/gateway $(ARGS)

bench-start: setup ## Measure cold start, warm start and tour in a fresh clone; one JSON line last
	@$(BIN)/python deploy/tools/bench_start.py
