# Two commands set everything up: `make demo` and `make test`. Needs Python 3.11.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SDK := build/sdk
# Tests run in so many processes, file by file; with 0 in one, as `pytest` alone runs them.
PROCESSES ?= 2
SOURCES := $(shell find cuvis_dist jobs -name '*.py')

.PHONY: demo test test-all test-kernels lint bench install sdk browser clean

# A complete two-phase run on a generated archive; the second time its result is shown again.
demo: outputs/demo/summary.txt
	@cat $<

outputs/demo/summary.txt: $(INSTALLED) $(SOURCES)
	@mkdir -p $(@D)
	$(BIN)/cuvis-dist demo --folder outputs/demo --workers 2 --train-workers 2 --restart > $@.part
	@mv $@.part $@

test: $(INSTALLED) sdk
	$(BIN)/python -m pytest -n $(PROCESSES) $(PYTEST_ARGS)

# Also those marked long, which CI leaves out to stay short on two cores.
test-all: $(INSTALLED) sdk
	$(BIN)/python -m pytest -n $(PROCESSES) -m "long or not long" $(PYTEST_ARGS)

# The tests of equality and of the same bits once more, with the kernels of an older processor; set
# before Python starts, so that Ray's workers inherit them. MKL and PyTorch have them for x86_64.
test-kernels: export MKL_CBWR = COMPATIBLE
test-kernels: export ATEN_CPU_CAPABILITY = default
ifeq ($(shell uname -m),x86_64)
test-kernels: export OPENBLAS_CORETYPE = Nehalem
else
test-kernels: export OPENBLAS_CORETYPE = ARMV8
endif
test-kernels: $(INSTALLED)
	$(BIN)/python -m pytest -n $(PROCESSES) -m "kernels and not long" $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python tests/benchmarks/initialization.py $(BENCH_ARGS)
	$(BIN)/python tests/benchmarks/commands.py
	$(BIN)/python tests/benchmarks/training.py
	$(BIN)/python tests/benchmarks/decoding.py
	$(BIN)/python tests/benchmarks/scheduling.py

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cu3s,tiff,dev]'
	@touch $@

# A genuine SDK library for tests of its error paths (marker sdk), never for decoding: the last
# wheel that bundles it, unpacked beside the environment. Without it those tests are skipped.
sdk: $(INSTALLED)
	@test -e $(SDK)/libcuvis.so || { mkdir -p $(SDK) \
	  && $(BIN)/python -m pip download --quiet --no-deps -d $(SDK) cuvis-il==3.3.1 \
	  && $(BIN)/python -m zipfile -e $(SDK)/cuvis_il-3.3.1-*.whl $(SDK) \
	  && rm $(SDK)/*.whl \
	  && ln -s cuvis_il.libs/$$(basename $(SDK)/cuvis_il.libs/libcuvis-*.so.3.3.1) $(SDK)/libcuvis.so; } \
	  || echo "no SDK library to be had here: tests marked sdk will be skipped"

# A browser for the tests of reports: Debian's package, for whoever may install it. Without any
# those tests are skipped.
browser:
	@for name in chromium google-chrome chrome; do command -v $$name && exit 0; done; \
	  { timeout 60 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -y -qq \
	    --no-install-recommends chromium fonts-dejavu-core; } >/dev/null \
	  || echo "no Chromium to be had here: tests in a browser will be skipped"

clean:
	rm -rf build outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
