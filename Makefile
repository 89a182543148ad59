# The two commands of the README, and what a contributor needs. Everything happens in .venv.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# timm needs torchvision, and accelerate, datasets and transformers behave differently where torchvision can be found:
# so both live outside .venv, and the tests marked timm run by themselves, on few enough files to need no second worker.
WITHOUT_TIMM := $(PYTEST) -n 2
WITH_TIMM := PYTHONPATH=.timm $(PYTEST)

.PHONY: quickstart test test-all lint clean

# Reinstalls where sources that are compiled, or what is depended on, have changed; Python sources are used in place.
.venv/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/gspn/kernels/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,onnx,dev]"
	touch $@

# Without dependencies: a resolver might replace torch by a build of several gigabytes.
.timm/.installed: .venv/.installed
	rm -rf .timm
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --target .timm timm torchvision
	touch $@

quickstart: .venv/.installed
	$(BIN)/gspn train digits --model gspn_micro --out runs/quickstart --overwrite
	$(BIN)/gspn eval runs/quickstart digits

test: .venv/.installed .timm/.installed
	$(WITHOUT_TIMM) -m "not slow and not timm"
	$(WITH_TIMM) -m "timm and not slow"

test-all: .venv/.installed .timm/.installed
	$(WITHOUT_TIMM) -m "not timm"
	$(WITH_TIMM) -m timm

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .timm build dist runs
