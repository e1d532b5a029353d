# Every target sets up what it needs in .venv; nothing is installed outside of the checkout.
#   make test    the whole test suite           make lint    ruff, mypy, clang-format
#   make test-library, make test-integrations    its two halves: without and with model libraries
#   make test-long    the same tests with several times as many random inputs and compiled kernels
#   make test-integrations INSTEAD=dir   with other versions of these, installed by pip install --no-deps --target dir
#   make typing    the examples under mypy --strict and pyright, with the types of the model libraries
#   make demo    the continual learning demo    make bench   benchmarks against installed peers, and of the host alone
#   make suite   continual learning with every method on language and vision
#   make sanitize    tests of the compiled kernels under the address, undefined behaviour and thread sanitizers of GCC
#   make sweep    small models of many architectures against plain autograd; writes docs/architectures.md
#   make ptx-check    what Triton and nvcc make of the kernels, executed on the CPU and checked; PTX_ARGS="--arch sm_90", PTX_ARGS=--cuda
#   make docs    the pages of docs/ and the API reference as a searchable site, in build/docs
#   make format  rewrite sources in style       make clean   remove build outputs (make distclean: .venv as well)
#   make gpu-check OUT=dir   tests and benchmarks on a CUDA machine, with the PyTorch, Triton and pytest of PYTHON; no .venv
#   make gpu-cache   compiles the kernels of gpu-check beforehand, without a GPU; with the Triton of PYTHON; no .venv
# Variables: PYTHON, MAX_JOBS, FUSED_EWCLORA_BUILD, TEST_ARGS, SANITIZERS, INSTEAD, DEMO_ARGS, SUITE_ARGS, SWEEP_ARGS, PTX_ARGS, BENCH_ARGS, OUT, CHECK_ARGS, CACHE_ARGS

PYTHON ?= python3
TEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
REQUIREMENTS := .venv/.requirements
INSTALL := .venv/.install
EXTENSION := build/.extension
EXTRAS := .venv/extras
SITE := .venv/.site

.PHONY: test test-long test-library test-integrations sanitize demo suite sweep ptx-check docs lint typing typing-mypy typing-pyright format bench gpu-check gpu-cache setup clean distclean
.DELETE_ON_ERROR:

test: test-library test-integrations

test-long: export FUSED_EWCLORA_TEST_LONG := 1
test-long: test

test-library: setup
	python -m pytest $(TEST_ARGS)

test-integrations: setup $(EXTRAS)
	FUSED_EWCLORA_TEST_INTEGRATIONS=required PYTHONPATH=$(if $(INSTEAD),$(abspath $(INSTEAD)):)$(CURDIR)/$(EXTRAS)$(if $(PYTHONPATH),:$(PYTHONPATH)) \
	    python -m pytest $(if $(findstring tests/,$(TEST_ARGS)),,tests/integrations) $(TEST_ARGS)

sanitize: $(INSTALL)
	python tests/helpers/sanitize.py $(SANITIZERS)

demo: setup
	python -m fused_ewclora demo $(DEMO_ARGS)

# The language problem needs transformers and tokenizers.
suite: setup $(EXTRAS)
	PYTHONPATH=$(CURDIR)/$(EXTRAS)$(if $(PYTHONPATH),:$(PYTHONPATH)) python -m fused_ewclora demo --suite $(SUITE_ARGS)

# Minutes on two cores; SWEEP_ARGS="bert swin" runs the architectures with these in their names and writes nothing.
sweep: setup $(EXTRAS)
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests/helpers:$(CURDIR)/$(EXTRAS)$(if $(PYTHONPATH),:$(PYTHONPATH)) python -m sweep $(SWEEP_ARGS)

ptx-check: export PYTHONPATH := $(CURDIR):$(CURDIR)/tests/helpers$(if $(PYTHONPATH),:$(PYTHONPATH))
ptx-check: setup
	python -m ptx.check $(PTX_ARGS)
	$(if $(PTX_ARGS),,python -m ptx.check --cuda --seeds 2)

# Without arguments also the host times; a target that one of them misses does not keep the other from running.
bench: export PYTHONPATH := $(CURDIR)/$(EXTRAS)$(if $(PYTHONPATH),:$(PYTHONPATH))
bench: setup $(EXTRAS)
	python -m benchmarks $(BENCH_ARGS)$(if $(BENCH_ARGS),,; status=$$?; python -m benchmarks.host && exit $$status)

gpu-check:
	@test -n "$(OUT)" || { echo "make gpu-check OUT=dir: OUT names the folder of the results"; exit 2; }
	PYTHONPATH=$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) -m benchmarks.gpu_check --out $(OUT) $(CHECK_ARGS)

gpu-cache:
	PYTHONPATH=$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) -m benchmarks.gpu.cache $(or $(OUT),build/gpu-cache) $(CACHE_ARGS)

# Dead links and unknown names are errors. Docstrings are read without importing anything.
docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet

lint: $(REQUIREMENTS)
	ruff check .
	ruff format --check .
	mypy
	$(if $(CPP),clang-format --dry-run --Werror $(CPP) $(wildcard tests/backends/cuda/emulator/*.cpp tests/helpers/ptx/machine/* tests/helpers/launcher/*.cpp))

# As a user's programs, whose libraries are installed; a minute and more without the cache of an earlier run. Each checker takes one core:
# `make -j2 typing` runs them side by side.
typing: typing-mypy typing-pyright

typing-mypy typing-pyright: export PYTHONPATH := $(CURDIR)/$(EXTRAS)$(if $(PYTHONPATH),:$(PYTHONPATH))
typing-mypy: $(REQUIREMENTS) $(EXTRAS)
	mypy --strict --config-file tests/project/typing/mypy.ini --cache-dir .mypy_cache/users examples/*.py

typing-pyright: $(REQUIREMENTS) $(EXTRAS)
	pyright --pythonpath .venv/bin/python examples/*.py

format: $(REQUIREMENTS)
	ruff check --fix .
	ruff format .
	$(if $(CPP),clang-format -i $(CPP) $(wildcard tests/backends/cuda/emulator/*.cpp tests/helpers/ptx/machine/* tests/helpers/launcher/*.cpp))

setup: $(INSTALL) $(EXTENSION)

$(REQUIREMENTS): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    "the pinned versions need Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv .venv
	python -m pip install --quiet $$(grep -E '^(pip|setuptools|wheel)==' requirements-dev.txt)
	python -m pip install --quiet -r requirements-dev.txt
	touch $@

# The package is installed as a link to this folder; its extension is compiled in place, so that only changed files recompile.
$(INSTALL): $(REQUIREMENTS) setup.py pyproject.toml
	FUSED_EWCLORA_BUILD=none python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# In a separate folder, so that the tests of the library never see them; without dependencies, so that torch is not replaced.
$(EXTRAS): requirements-extras.txt $(REQUIREMENTS)
	rm -rf $@
	python -m pip install --quiet --no-deps --target $@ -r requirements-extras.txt
	touch $@

$(SITE): requirements-docs.txt $(REQUIREMENTS)
	python -m pip install --quiet -r requirements-docs.txt
	touch $@

$(EXTENSION): $(REQUIREMENTS) setup.py $(CPP)
	python setup.py --quiet build_ext --inplace
	mkdir -p build && touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis fused_ewclora/_C*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
