# Every target sets itself up: .venv gets the pinned set once, and again when the pins change.

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --retries 10
# Two workers of one thread each; idle OpenMP threads must not spin.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -q -n 2 --dist loadgroup
# Kernels are also compiled under these versions of Triton, beside the pinned one.
TRITONS := 3.5.1 3.6.0 3.9.0
# Trainers that do not go with the pinned set: each lies beside it, and is tested by itself.
TRAINERS := ms-swift skyrl

.PHONY: help test test-all test-beyond test-integrations trainer-memory lint build/house house distill distill-study drift-study fuzz sanitize mutants bench bench-cpu bench-growth \
	readme-table page-pictures docs docs-serve compat compile-check wheel-check wheels clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1: \2/p' Makefile

# tests/beyond.py lists what the first leaves to the second.
test: .venv/.installed  ## what it takes to trust an installation: eight minutes on two cores, set-up included
	$(PYTEST) -m "not beyond"

test-all: test test-beyond  ## every test: twelve minutes more

test-beyond: .venv/.installed
	$(PYTEST) -m beyond

test-integrations: $(TRAINERS:%=test-%)  ## the integrations whose projects are not in the pinned set

trainer-memory: .venv/.installed $(TRAINERS:%=.venv/%/.installed)  ## peak memory of each trainer's step beside its own loss
	$(PYTEST) -s -n 0 tests/test_trl_options.py tests/test_verl*.py -k peak_memory
	$(foreach name,$(TRAINERS),PYTHONPATH=$(CURDIR)/.venv/$(name) $(PYTEST) -s -n 0 \
	  tests/test_$(subst -,_,$(name)).py -k peak_memory;)

lint: build/house  ## ruff, mypy, and who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	cd build/house && $(abspath $(BIN))/lint-imports $(CURDIR)/pyproject.toml --no-cache --no-logo

# The package as it is installed, for tools that read imports: they look into packages alone, so
# that kernels/ and bench/ lie inside, and every folder has an __init__.py.
build/house: .venv/.installed
	rm -rf $@
	$(BIN)/python -W ignore setup.py -q build_py --build-lib $@ 2>&1 | grep -v byte-compiling || true
	find $@ -mindepth 1 -type d -exec touch {}/__init__.py \;

house: .venv/.installed  ## draw docs/house.svg from the imports
	$(BIN)/python docs/draw_house.py docs/house.svg

distill: .venv/.installed  ## train a small student from a small teacher in six ways
	$(BIN)/python -m drift_gate distill

# Ctrl-C at any time: the next call goes on. A folder of earlier runs is STUDY=FOLDER.
STUDY ?= runs/study
distill-study: .venv/.installed  ## the docs' comparison: 90 runs, hours
	$(BIN)/python -m drift_gate distill $(if $(wildcard $(STUDY)/settings.json),--resume $(STUDY), \
	  --seeds 5 --epochs 1 --epochs 2 --epochs 4 --out $(STUDY))
	$(BIN)/python -m drift_gate.bench.distill.study $(STUDY)

# Goes on with what an earlier call has left, as the one above.
DRIFT_STUDY ?= runs/drift-study
drift-study: .venv/.installed  ## the runs of docs/study_plan.md: hours
	$(BIN)/python -m drift_gate.bench.distill.plan $(DRIFT_STUDY)

fuzz: .venv/.installed  ## random problems against the float64 reference, for ten minutes
	$(BIN)/python -m drift_gate fuzz --minutes 10 --cases 1000000 --seed $$(date +%s)

sanitize: .venv/.installed  ## every kernel with exact bounds, races and poisoned memory, two ways
	DRIFT_GATE_KERNELS=ttsem $(PYTEST) tests/test_support.py tests/test_kernels_*.py
	DRIFT_GATE_KERNELS=interpret $(PYTEST) tests/test_support.py tests/test_kernels_*.py

mutants: .venv/.installed  ## plant small faults one by one: the tests must fail on each
	cd tests && ../$(BIN)/python -m mutants.run

bench: .venv/.installed  ## every pass and loss beside its peers; SUITES="scan opd_loss" for some
	$(BIN)/python -m drift_gate bench $(SUITES)

bench-cpu: .venv/.installed  ## the docs' figures on a CPU, in half an hour
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m drift_gate bench --grid targets --device cpu \
	  --budget 1500

bench-growth: .venv/.installed  ## time a token and memory over 64 times the rows, on a CPU
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m drift_gate bench --grid growth --device cpu \
	  --budget 1500 --rounds 3 opd_loss topk_loss full_loss linear_opd_loss linear_topk_loss

readme-table: .venv/.installed  ## write the figures of README and docs from the committed results
	$(BIN)/python -m drift_gate.bench.readme_table
	$(BIN)/python -m drift_gate.bench.distill.study
	$(BIN)/python -m drift_gate.bench.distill.drift_report

page-pictures: .venv/.installed  ## draw the gate and an eager loss's memory for the docs
	OMP_NUM_THREADS=1 $(BIN)/python -m drift_gate.bench.page_pictures

docs: .venv/docs/.installed  ## the site, in site/: a broken link or an argument without its words fails
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict

docs-serve: .venv/docs/.installed  ## the site, at port 8000, as it is written
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs serve

.venv/docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv .venv/docs
	.venv/docs/bin/python -m pip install --disable-pip-version-check --retries 10 -r $<
	touch $@

compile-check: $(TRITONS:%=compile-check-%)  ## compile the kernels under other versions of Triton

# Its own Triton, and of the pinned set what is not torch, Triton or a linter. Releases of torch with
# CUDA are some gigabytes.
TORCH ?= 2.14.1
COMPAT := .venv/torch-$(TORCH)
compat: $(COMPAT)/.installed  ## run the tests under another release: make compat TORCH=2.11.0
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(COMPAT)/bin/python -m pytest -q -n 2 --dist loadgroup

$(COMPAT)/.installed: requirements-dev.txt pyproject.toml | .venv/.installed
	$(PYTHON) -m venv $(COMPAT)
	grep -vE '^(torch|triton|ruff|mypy|import-linter)==' requirements-dev.txt > $(COMPAT)/requirements.txt
	$(COMPAT)/bin/python -m pip install torch==$(TORCH) -r $(COMPAT)/requirements.txt
	$(COMPAT)/bin/python -m pip install --no-deps --ignore-requires-python 'ttsem==0.1.0 ; python_version >= "3.11"'
	$(COMPAT)/bin/python -m pip install --no-deps 'verl==0.9.1 ; python_version < "3.13"'
	$(COMPAT)/bin/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

wheel-check: .venv/.installed  ## build the wheel from the sdist, and import it from elsewhere
	rm -rf dist
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')"
	$(PIP_INSTALL) --no-cache-dir --no-deps --no-build-isolation --target dist/site dist/*.tar.gz
	cd dist/site && test ! -e kernels && test ! -e bench && test -e drift_gate/py.typed
	cd dist/site && ../../$(BIN)/python -c "import os; \
	  import drift_gate.kernels.scan as kernels, drift_gate.bench.targets as bench; \
	  assert all(module.__file__.startswith(os.getcwd()) for module in (kernels, bench))"

# From the sdist, which has neither .venv nor .git.
wheels: wheel-check .venv/wheels/.installed  ## manylinux wheels for every Python, with the functions in C (needs Docker)
	.venv/wheels/bin/python -m cibuildwheel --platform linux --output-dir dist dist/*.tar.gz
	for wheel in dist/*manylinux*.whl; do \
	  $(PYTHON) -m zipfile -l $$wheel | grep -q passes/native/_rows || { echo "$$wheel has no C" >&2; exit 1; }; done

.venv/wheels/.installed:
	$(PYTHON) -m venv .venv/wheels
	.venv/wheels/bin/python -m pip install --disable-pip-version-check --retries 10 cibuildwheel==4.3.5
	touch $@

clean:  ## remove .venv and everything built
	rm -rf .venv build dist site *.egg-info drift_gate/passes/native/*.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# ttsem asks for Python 3.12, and runs on 3.11; on 3.10 the kernels run interpreted alone.
.venv/.installed: requirements-dev.txt pyproject.toml setup.py $(wildcard drift_gate/passes/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	  || { echo 'drift_gate needs Python 3.10 to 3.13: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -r requirements-dev.txt
	$(PIP_INSTALL) --no-deps --ignore-requires-python 'ttsem==0.1.0 ; python_version >= "3.11"'
	$(PIP_INSTALL) --no-deps 'verl==0.9.1 ; python_version < "3.13"'
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	touch $@

.PHONY: $(TRITONS:%=compile-check-%)
$(TRITONS:%=compile-check-%): compile-check-%: .venv/triton-%/.installed
	PYTHONPATH=$(CURDIR)/.venv/triton-$* $(PYTEST) tests/test_compile.py tests/test_compile_divergence.py

$(TRITONS:%=.venv/triton-%/.installed): .venv/triton-%/.installed: | .venv/.installed
	$(PIP_INSTALL) --no-deps --upgrade --target $(@D) triton==$*
	touch $@

.PHONY: $(TRAINERS:%=test-%)
$(TRAINERS:%=test-%): test-%: .venv/%/.installed
	PYTHONPATH=$(CURDIR)/.venv/$* $(PYTEST) -n 0 tests/test_$(subst -,_,$*).py

$(TRAINERS:%=.venv/%/.installed): .venv/%/.installed: tests/requirements-%.txt | .venv/.installed
	$(PIP_INSTALL) --no-deps --ignore-requires-python --upgrade --target $(@D) -r $<
	touch $@
