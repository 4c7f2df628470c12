PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
# Not $(BIN)/ruff and so on: in an environment layered on an image's Python a tool may stand in the image.
export PATH := $(abspath $(BIN)):$(PATH)
STAMP := $(VENV)/.installed
KERNELS := $(wildcard kernels/*.cu kernels/*.cuh)
INSTALLERS := tools/machine.py tools/make_venv.py tools/install_torch.py

# Open MPI refuses root without both variables, and more ranks than cores without OVERSUBSCRIBE. Binding would
# put all threads of a rank on one core.
MPI_ENV := OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
MPIRUN := mpirun --map-by :OVERSUBSCRIBE --bind-to none
# One rank per GPU, or four on the CPU.
RANKS ?= $$(python tools/machine.py ranks)

.PHONY: demo test lint format venv clean

demo: $(STAMP)
	$(MPI_ENV) $(MPIRUN) -n $(RANKS) python -m qcomm demo

test: lint
	python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	ruff check .
	ruff format --check .
	python -m mypy
	$(if $(KERNELS),clang-format --dry-run -Werror $(KERNELS))

format: $(STAMP)
	ruff check --fix .
	ruff format .
	$(if $(KERNELS),clang-format -i $(KERNELS))

venv: $(STAMP)

$(STAMP): pyproject.toml $(INSTALLERS)
	test -x $(BIN)/python || $(PYTHON) tools/make_venv.py $(VENV)
	python tools/install_torch.py
	python -m pip install -qq -e ".[$$(python tools/machine.py extras)]"
	-python -m pip install -qq --prefix $(VENV)/mpich mpich  # beside Open MPI, for a test that starts ranks by it
	touch $@

# Leaves the environment: `rm -r .venv` is one's own decision.
clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find qcomm kernels benchmarks tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
