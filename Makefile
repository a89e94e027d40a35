# make demo     the whole loop on the embedded model: install, calibrate, plan, build, run, report
# make test     install everything the tests need, then style, types and tests
# make style    rewrite the sources in the house style
# make quality  style and types only
PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt
# llama.cpp is compiled: its server, its TLS and its "common" library are not used by the bindings.
LLAMA_FLAGS := -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_ALL_WARNINGS=OFF -DGGML_NATIVE=OFF \
	-DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/.ci/llama-without-common.cmake
# Spinning OpenMP threads starve each other when several processes share few cores.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

.PHONY: demo test style quality chromium clean

demo: $(VENV)/.base
	$(BIN)/edge-moe demo

test: $(VENV)/.dev chromium quality
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n $(WORKERS)

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The report's test looks at the page in a browser; without one it skips and says so.
chromium:
	@for name in chromium chromium-browser google-chrome; do \
		command -v $$name >/dev/null && exit 0; \
	done; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "no Chromium, and no root to install it: the test that needs it will skip"; exit 0; \
	fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -qq >/dev/null 2>&1; \
	apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1 \
		|| echo "Chromium could not be installed: the test that needs it will skip"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(INPUTS) | $(VENV)/bin/python
	$(INSTALL) -e '.[report]'
	touch $@

$(VENV)/.dev: $(INPUTS) | $(VENV)/bin/python
	CMAKE_ARGS="$(LLAMA_FLAGS)" CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) \
		$(INSTALL) -e '.[gguf,onnx,genai,optimum,report,bench,cuda,dev]'
	touch $@ $(VENV)/.base

clean:
	rm -rf $(VENV) build dist *.egg-info
