# "make demo" and "make test" need Python 3.10 or newer and make: the rest they fetch themselves, the
# Python packages into .venv and, for the tests, a browser, Redis, four proxies, systemd-analyze, curl and a C compiler
# from Debian.

PYTHON ?= python3
PORT ?= 5000
PYTEST_ARGS ?=
# Test processes. Most tests wait for servers, so there may be more than processors.
JOBS ?= 4
# --peers compares with other libraries' servers too. The endurance takes ten minutes for each server by itself.
BENCH_ARGS ?=
ENDURANCE_ARGS ?=
# --short is five minutes, and --broker sqlite the other store.
SOAK_ARGS ?=
# FUZZ_ARGS: --targets decoder body, --keep adds what reached new code to the corpus.
FUZZ_SECONDS ?= 60
FUZZ_EXAMPLES ?= 2000
FUZZ_ARGS ?=
RESULTS ?= benchmarks/_build/results
TOX_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pips in one environment break it, so -j is not for this file.
.NOTPARALLEL:
.PHONY: help demo test bench soak fuzz docs style typing package tox clean test-programs bench-programs

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-8s %s\n' "$$name" "$$text"; done
	@echo
	@echo "  PYTHON=python3.12 chooses the interpreter, PORT=8000 the demo's port, PYTEST_ARGS=\"-k window\" the tests."

demo: $(VENV)/.with-demo  ## the demo, on http://127.0.0.1:5000 unless PORT says otherwise
	PORT=$(PORT) $(BIN)/python examples/demo/app.py

# The second run holds the promise that nothing depends on whether the standard library is patched. It waits for
# servers most of its time, so it runs beside the first one, and is shown when that is done. Its -m comes last, so
# that PYTEST_ARGS cannot let a browser in; 5 is pytest's "nothing left to run" when PYTEST_ARGS chose live tests alone.
test: test-programs $(VENV)/.with-tests  ## the whole test suite, and again under gevent's monkey patching
	@$(BIN)/python -m gevent.monkey --module pytest $(PYTEST_ARGS) -m "not live and not browser and not elsewhere" \
		> $(VENV)/patched.log 2>&1 & patched=$$!; \
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS); plain=$$?; \
	wait $$patched; patched=$$?; \
	echo; echo "Under gevent's monkey patching:"; cat $(VENV)/patched.log; \
	[ $$plain -eq 0 ] && { [ $$patched -eq 0 ] || [ $$patched -eq 5 ]; }

bench: bench-programs $(VENV)/.with-bench  ## what a delivery, an idle client and a broker cost on this machine
	mkdir -p $(RESULTS)
	for program in fanout memory views brokers reconnect_storm; do \
		$(BIN)/python benchmarks/$$program.py --json $(RESULTS)/$$program.json $(BENCH_ARGS) || exit; done
	$(BIN)/python benchmarks/endurance.py --json $(RESULTS)/endurance.json $(ENDURANCE_ARGS)
	@echo "Plots for the docs: $(BIN)/python benchmarks/plot.py $(RESULTS)/*.json"

soak: bench-programs $(VENV)/.with-bench  ## an hour of load while everything goes wrong, and who was given what
	$(BIN)/python benchmarks/soak.py $(SOAK_ARGS)

# The first is by coverage and takes FUZZ_SECONDS for each target; the second sends FUZZ_EXAMPLES requests to each server.
fuzz: test-programs $(VENV)/.with-tests $(VENV)/.with-fuzz  ## minutes of inputs and requests that nobody thought of
	$(BIN)/python tests/fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/live/test_live_requests.py tests/fuzz

docs: $(VENV)/.with-docs  ## the documentation, where a warning is an error
	$(BIN)/python -m sphinx -q -n -W --keep-going -b html docs docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html"

style: $(VENV)/.with-style  ## ruff's rules and its formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The last run looks whether every public name says its type; it asks the first Python on the PATH where packages are.
typing: $(VENV)/.with-typing  ## mypy and pyright, strict
	$(BIN)/python -m mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=. $(BIN)/basedpyright --ignoreexternal --verifytypes flask_sse_stream

# The wheel is built from the sdist, as "python -m build" does it; from one commit always the same wheel, byte by byte.
package: test-programs $(VENV)/.with-package  ## the sdist and the wheel in dist, tried in empty environments
	rm -rf build dist
	$(BIN)/check-manifest
	SOURCE_DATE_EPOCH="$$(git log -1 --format=%ct)" $(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/try_package.py --jobs $(JOBS) dist build/tried

# pyenv puts shims on PATH that refuse to run whatever is not activated, so tox is shown the real ones.
tox: test-programs $(VENV)/.with-tox  ## every Python that is here, the lowest dependencies, and all of the above
	TOX_DISCOVER="$$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[0-9]*/bin/python 2>/dev/null)" \
		$(BIN)/tox $(TOX_ARGS)

clean:  ## everything that these targets made
	rm -rf $(VENV) .tox build dist docs/_build benchmarks/_build *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- what the targets stand on ------------------------------------------------------------------------

# $(call from-debian,PACKAGES,WHAT FOR): a shell command that installs them, or says what to do and fails.
# What is offline starts no service: the tests start the programs themselves, and port 80 is nobody's business here.
define from-debian
{ \
	as=no; \
	if ! command -v apt-get >/dev/null; then :; \
	elif [ "$$(id -u)" -eq 0 ]; then as=; \
	elif sudo -n true 2>/dev/null; then as="sudo -n"; fi; \
	if [ "$$as" = no ]; then \
		echo "$(2) not here: please install by hand:" $(1) "(names of Debian packages)." >&2; exit 1; \
	fi; \
	echo "Installing Debian packages:" $(1); \
	$$as apt-get update -qq \
	&& $$as env DEBIAN_FRONTEND=noninteractive SYSTEMD_OFFLINE=1 apt-get install -qq -y --no-install-recommends $(1); \
}
endef

# A compiler without the C library's headers is no compiler; asking it is surer than looking for files.
find-compiler = printf '\043include <stdio.h>\n' | cc -fsyntax-only -x c - 2>/dev/null \
	|| missing="$$missing gcc libc6-dev"

# Debian has proxies where they are not on everybody's PATH. After a colon: the package, where its name is another. The one
# that is called apache2 would bring a service along.
test-programs:
	@missing=; \
	for program in chromium redis-server nginx haproxy caddy apache2:apache2-bin systemd-analyze:systemd curl; do \
		PATH="$$PATH:/usr/sbin" command -v "$${program%:*}" >/dev/null || missing="$$missing $${program#*:}"; \
	done; \
	$(find-compiler); \
	[ -z "$$missing" ] || $(call from-debian,$$missing,What the tests drive is)

bench-programs:
	@missing=; \
	command -v redis-server >/dev/null || missing="$$missing redis-server"; \
	$(find-compiler); \
	[ -z "$$missing" ] || $(call from-debian,$$missing,What the benchmarks need is)

# Debian keeps ensurepip in a package of its own, and without it venv leaves half an environment behind.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "This needs Python 3.10 or newer, which \"$(PYTHON)\" is not: say make PYTHON=/path/to/python." >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		package="python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"; \
		$(call from-debian,$$package,Python's venv is); }
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)

# pip says at length that an install is editable unless it is told to speak of errors alone (-qq).
# The pip that comes with a new environment may be too old to know --group.
$(VENV)/.pip: $(BIN)/python
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade "pip>=25.1"
	@touch $@

# One stamp for each dependency group, out of date when pyproject.toml changes.
$(VENV)/.with-%: pyproject.toml $(VENV)/.pip
	@echo "Installing what \"$*\" needs into $(VENV)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable . --group $*
	@touch $@
