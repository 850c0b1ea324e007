# make test | bench | lint | format: each makes the environment it needs in $(VENV).
#   make test TORCH=torch==2.13.0        with that torch (default: the newest, several GB)
#   make test WHEEL=dist/x.whl           that wheel instead of building one
#   make test PYTEST_ARGS="-k regions"   make bench BENCH_ARGS=--full
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
WHEEL ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
pip = $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: test bench wheel lint format clean

test: install-test
	$(VENV)/bin/pytest -q $(PYTEST_ARGS) tests

bench: install-benchmark
	$(VENV)/bin/python benchmarks/bench_losses.py $(BENCH_ARGS)

# Torch first: the build and the package's own requirement then take the one that is there.
install-%: | $(VENV)/bin/python
	$(pip) install -q "$(TORCH)" "setuptools>=77" ninja
	$(if $(WHEEL),,rm -rf build/lib* $(VENV)/wheel; $(pip) wheel -q --no-deps -w $(VENV)/wheel .)
	wheel=$(or $(WHEEL),$$(ls $(VENV)/wheel/*.whl)) && $(pip) install -q "$$wheel[$*]" && \
	  $(pip) install -q --no-deps --force-reinstall "$$wheel"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

lint format: | $(VENV)/bin/python
	$(pip) install -q ruff==0.17.6 clang-format==23.1.5
	$(VENV)/bin/ruff format $(if $(filter lint,$@),--check) .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs \
	  $(VENV)/bin/clang-format $(if $(filter lint,$@),--dry-run -Werror,-i)
	$(VENV)/bin/ruff check $(if $(filter format,$@),--fix) .

clean:
	rm -rf build dist *.egg-info $(VENV) sea_kernels/_C.so
