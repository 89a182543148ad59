# The two commands of the README, and what a contributor needs. Everything happens in .venv.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: quickstart test test-all lint clean

# Reinstalls where sources that are compiled, or what is depended on, have changed; Python sources are used in place.
.venv/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/gspn/kernels/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,dev]"
	touch $@

quickstart: .venv/.installed
	$(BIN)/gspn train digits --model gspn_micro --out runs/quickstart --overwrite
	$(BIN)/gspn eval runs/quickstart digits

test: .venv/.installed
	$(PYTEST) -m "not slow"

test-all: .venv/.installed
	$(PYTEST)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist runs
