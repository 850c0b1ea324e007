# make test | bench | lint | format: each creates the virtual environment that it needs in $(VENV).
#   make test TORCH=torch==2.13.0        with that torch (default: the newest, several GB)
#   make test WHEEL=dist/x.whl           installs that wheel instead of building one
#   make test PYTEST_ARGS="-k regions"   make bench BENCH_ARGS=--full
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
WHEEL ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
pip = $(VENV)/bin/python -m pip --disable-pip-version-check
say = @echo "=== $(1)"

.PHONY: test bench lint format clean

test: install-test
	$(call say,Running the tests: about ten minutes on two cores)
	@$(VENV)/bin/pytest -q -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS) tests

bench: install-benchmark
	$(call say,Running the benchmark: about three minutes on two cores)
	@$(VENV)/bin/python benchmarks/bench_losses.py $(BENCH_ARGS)

# Torch first: the build and the package's own requirement then take the one that is there.
install-%: | $(VENV)/bin/python
	$(call say,Installing $(TORCH) in $(VENV): several GB unless it is there or TORCH names another)
	@$(pip) install -q "$(TORCH)" "setuptools>=77" ninja
	@$(if $(WHEEL),,$(MAKE) -s $(VENV)/wheel)
	$(call say,Installing the wheel and what the $* needs)
	@wheel=$(or $(WHEEL),$$(ls $(VENV)/wheel/*.whl)) && $(pip) install -q "$$wheel[$*]" && \
	  $(pip) install -q --no-deps --force-reinstall "$$wheel"

# By the build backend itself, because pip would hide the compiler's progress.
.PHONY: $(VENV)/wheel
$(VENV)/wheel:
	$(call say,Compiling the kernels: a minute; with nvcc some more)
	@rm -rf build/lib* $@ && mkdir $@
	@$(VENV)/bin/python -c 'import build_backend; build_backend.build_wheel("$@", {"--global-option": ["-q"]})'

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV)

lint format: | $(VENV)/bin/python
	@$(pip) install -q ruff==0.17.6 clang-format==23.1.5
	$(VENV)/bin/ruff format $(if $(filter lint,$@),--check) .
	find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs \
	  $(VENV)/bin/clang-format $(if $(filter lint,$@),--dry-run -Werror,-i)
	$(VENV)/bin/ruff check $(if $(filter format,$@),--fix) .

clean:
	rm -rf build dist *.egg-info $(VENV) sea_kernels/_C.so
