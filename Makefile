# make site    the course site, from nothing, in build/site/
# make test    every check but the long ones, from nothing
# The other targets: horovod (compiled once, part of test), lab, notebooks, lint, stress, wheel, lock, clean.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
PIP_INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

# What the notebooks compare and the tests run besides: engines, video, servers.
OPTIONAL := detect,openvino,litert,tensorrt,serve

# The parts of `test`, two at a time, each silent until it has ended. The native libraries of all rooms in one process
# end in a crash that none of them has alone.
PARTS := test-notebooks test-first test-rest test-engines
FIRST := tests/bench tests/cli tests/compress tests/datasets tests/detect

# Those of `stress`, likewise, but for what measures, which wants the machine for itself.
STRESS := stress-first stress-rest stress-detect stress-engines
MEASURES := tests/metrics tests/compress/test_channels.py tests/serve/test_soak.py

TWO_AT_A_TIME = $(MAKE) --jobs=2 --keep-going --output-sync=target --no-print-directory

# One thread: on a busy machine two wait for each other, and only one gives the same weights every time.
test $(PARTS) stress $(STRESS): export OMP_NUM_THREADS ?= 1

# Data beside the project, when there is some (full-size CIFAR-10 and the like): tests that want it skip without it.
SHARED_DATA := $(wildcard ../shared/datasets)
export COMPANION_TEST_DATA ?= $(if $(SHARED_DATA),$(abspath $(SHARED_DATA)))

.PHONY: site test $(PARTS) horovod lint lab notebooks stress $(STRESS) wheel lock clean

site: $(VENV)/.site
	$(PY) tools/build_site.py
	$(PY) tools/check_site.py build/site
	$(PY) tools/check_browser.py build/site build/screenshots

test: $(VENV)/.test
	$(PY) tools/build_horovod.py --or-skip
	$(TWO_AT_A_TIME) $(PARTS)

$(PARTS) $(STRESS): $(VENV)/.test

test-notebooks:
	TQDM_DISABLE=1 PYTHONPATH=tests/offline $(PY) -m pytest --nbval --nbval-current-env --nbval-cell-timeout 300 \
	    --nbval-sanitize-with tests/notebooks/sanitize.cfg -o filterwarnings= notebooks

test-first:
	$(PY) -m pytest $(FIRST)

test-rest:
	$(PY) -m pytest $(addprefix --ignore=,$(FIRST) tests/engines)

test-engines:
	$(PY) -m pytest tests/engines

# The wheel stays in the user's cache, which `make clean` leaves alone.
horovod: $(VENV)/.test
	$(PY) tools/build_horovod.py

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

lab: $(VENV)/.notebooks
	$(VENV)/bin/jupyter lab --notebook-dir=notebooks

# Runs the notebooks again, from top to bottom, and stores what they print.
notebooks: $(VENV)/.notebooks
	$(PY) tools/run_notebooks.py

stress: $(VENV)/.test
	$(PY) -m pytest -m stress $(MEASURES)
	$(TWO_AT_A_TIME) $(STRESS)

stress-first:
	$(PY) -m pytest -m stress $(addprefix --ignore=,$(MEASURES)) $(filter-out tests/detect,$(FIRST))

stress-rest:
	$(PY) -m pytest -m stress $(addprefix --ignore=,$(MEASURES) $(FIRST) tests/engines)

# Apart from the first, whose pruned networks of full size take as long as all others.
stress-detect:
	$(PY) -m pytest -m stress tests/detect

stress-engines:
	$(PY) -m pytest -m stress tests/engines

wheel: $(VENV)/.test
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

lock:
	$(PYTHON) -m venv build/lock && build/lock/bin/pip install --quiet uv
	build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --extra all --no-emit-package companion \
	    --no-annotate --upgrade --custom-compile-command "make lock" pyproject.toml -o constraints.txt

clean:
	rm -rf build dist $(VENV)

$(PY):
	$(PYTHON) -m venv $(VENV)

# The site needs its own extra and the package itself, not torch: its reference pages mock what they do not import.
$(VENV)/.site: pyproject.toml constraints.txt | $(PY)
	@echo "setting up $(VENV) for the site: a few hundred megabytes, about a minute"
	$(PIP_INSTALL) $$($(PY) tools/extra.py site)
	$(PIP_INSTALL) --no-deps -e .
	touch $@

$(VENV)/.notebooks: pyproject.toml constraints.txt | $(PY)
	@echo "setting up $(VENV) for the notebooks: with PyTorch several gigabytes, some minutes"
	$(PIP_INSTALL) -e ".[notebooks,$(OPTIONAL)]"
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(PY)
	@echo "setting up $(VENV) for the tests: with PyTorch several gigabytes, some minutes"
	$(PIP_INSTALL) -e ".[notebooks,test,$(OPTIONAL)]"
	touch $@
