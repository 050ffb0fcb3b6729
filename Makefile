# Every target works in the environment of $(PYTHON), which has fastbert[test] installed.
PYTHON ?= python
BIN := $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))")
NATIVE_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test bench lint check format clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo:  ## a real checkpoint beside Hugging Face: parity, speed, a chart
	$(BIN)/fastbert demo

test:  ## the default tier of tests
	$(PYTHON) -m pytest -n auto

bench:  ## every op and the model against its peers, to bench/results
	$(PYTHON) bench/run.py
	$(PYTHON) bench/model.py
	$(PYTHON) bench/cpu_peers.py

lint:  ## style and types; changes nothing
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)

check: lint test  ## what must pass before a commit

format:  ## apply the style
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

clean:  ## remove what builds and tests left behind
	rm -rf build dist *.egg-info fastbert/_build.json fastbert/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fastbert kernels tests bench -name __pycache__ -prune -exec rm -rf {} +
