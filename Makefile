# The two commands of the README, and what a contributor needs. Everything happens in .venv.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Three processes, for some packages change what others do. timm needs torchvision, and where that can be found
# accelerate, datasets and transformers behave differently: both stand in .timm, beside .venv. Triton is an interpreter
# or not for a whole process. The second has so few tests that workers would only cost time.
MAIN := $(PYTEST) -n 2 --dist worksteal
WITH_TIMM := PYTHONPATH=.timm $(PYTEST)
WITH_TRITON := TRITON_INTERPRET=1 $(PYTEST) -n 2
CPU_SOURCES := $(wildcard src/gspn/kernels/cpu/*.* src/gspn/kernels/cpu/*/*.*)
TRITON_TESTS := $(wildcard tests/kernels/test_triton*.py)

# Where this is set, every process compiles all of torch that it imports, which takes ten seconds each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-all lint docs clean

# Reinstalls where sources that are compiled, or what is depended on, have changed; Python sources are used in place.
# --no-compile: bytecode of the few modules that are imported is made then; that of all takes a minute and a half.
.venv/.installed: pyproject.toml weights/pyproject.toml constraints.txt CMakeLists.txt $(CPU_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[train,onnx,diffusion,dev]" -e ./weights
	touch $@

# Without dependencies: a resolver might replace torch by a build of several gigabytes.
.timm/.installed: .venv/.installed
	rm -rf .timm
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt --no-deps --target .timm timm torchvision segmentation-models-pytorch
	touch $@

quickstart: .venv/.installed
	$(BIN)/gspn train digits --model gspn_micro --out runs/quickstart --overwrite
	$(BIN)/gspn eval runs/quickstart digits

# A part that fails, or that finds no tests (pytest ends with 5), does not keep the others from running. The second runs
# beside the first, whose workers wait for one another at times, and is shown after it.
test: SPEED := not slow and
test test-all: .venv/.installed .timm/.installed
	@trap 'kill $$timm; exit 130' INT; failed=; \
	$(WITH_TIMM) -m "$(SPEED) timm" >.timm/tests.log 2>&1 & timm=$$!; \
	$(MAIN) -m "$(SPEED) not timm and not triton" || failed="$$failed main"; \
	wait $$timm || failed="$$failed timm"; cat .timm/tests.log; \
	$(WITH_TRITON) -m "$(SPEED) triton" $(TRITON_TESTS) || failed="$$failed triton"; \
	test -z "$$failed" || { echo "tests failed in these parts:$$failed" >&2; exit 1; }

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPU_SOURCES)

# Sphinx is only needed here, so that installing for the tests stays short. A warning is an error.
.venv/.docs-installed: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

docs: .venv/.docs-installed
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html -c docs . build/docs
	@echo "open build/docs/index.html"

clean:
	rm -rf .venv .timm build dist runs
