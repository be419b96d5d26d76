# make test   lint, types and all tests      (environment: .venv)
# make demo   the main job on real images    (environment: .venv-demo, no PyTorch)
# make check  lint and types only
# make bench  build times and CPU latencies of the five CNNs, stored in scripts/results/
PYTHON ?= python3
VENV := .venv
DEMO_VENV := .venv-demo
PYTEST_ARGS ?=
# A pair that fits: left to itself, pip can combine a CPU build of one with a CUDA build of the other.
TORCH ?= torch==2.14.1 torchvision==0.29.1

.PHONY: test check demo bench clean python-check

# pytest, not python -m pytest: the latter would test the source folder and not the installed package.
test: check
	$(VENV)/bin/pytest $(PYTEST_ARGS)

# build/lib would bring back modules that are no longer in the source.
check: $(VENV)/.installed
	rm -rf build/lib
	$(VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml

demo: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall .
	$(DEMO_VENV)/bin/python scripts/demo/run_demo.py

bench: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall .
	$(VENV)/bin/python scripts/bench_cpu.py

python-check:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.10 to 3.13 is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "venv is missing: apt install python3-venv"; exit 1; }
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "a C++ compiler is missing: apt install g++"; exit 1; }

$(VENV)/.installed: pyproject.toml | python-check
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet '.[train,tune,cuda,plots,dev]' $(TORCH)
	touch $@

$(DEMO_VENV)/.installed: pyproject.toml | python-check
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(DEMO_VENV)/bin/python -m pip install --quiet .
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) build *.egg-info
