# `make demo` and `make test` do everything on a fresh machine: each makes the virtual environments that it needs.

PYTHON ?= python3
PYTEST ?= -n 2 -m "not slow"
NEWEST = .venv
OLDEST = .venv-oldest

.PHONY: demo test test-newest test-oldest test-slow docs style format clean

## The main job on real text. MODEL=<smollm2, path or Hub id> starts from that checkpoint, DATA=<file, folder, web or Hub id>.
demo: $(NEWEST)/.installed
	OMP_WAIT_POLICY=PASSIVE $(NEWEST)/bin/python -m recipes.demo $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(ARGS)

## The tests, with the newest and with the oldest supported transformers.
test: test-newest test-oldest

test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pytest $(PYTEST) $(ARGS)

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(PYTEST) $(ARGS)

## The slow tests: long trainings, downloads of real data, cross-compilation, other packages' own tests.
test-slow: $(NEWEST)/.upstream
	$(NEWEST)/bin/python -m pytest -m slow $(ARGS)

## The site of README, docs/ and the other pages, into site/. A broken link fails; nothing is fetched.
docs: $(NEWEST)/.docs
	NO_MKDOCS_2_WARNING=1 $(NEWEST)/bin/python -m mkdocs build --strict

style: $(NEWEST)/.installed
	$(NEWEST)/bin/ruff check .
	$(NEWEST)/bin/ruff format --check .

format: $(NEWEST)/.installed
	$(NEWEST)/bin/ruff check --fix .
	$(NEWEST)/bin/ruff format .

$(NEWEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(NEWEST)/.upstream: $(NEWEST)/.installed
	DS_BUILD_OPS=0 $(NEWEST)/bin/python -m pip install -q -c constraints.txt -e '.[dev,upstream]'
	touch $@

$(NEWEST)/.docs: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pip install -q -c constraints.txt -e '.[dev,docs]'
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(NEWEST) $(OLDEST) .pytest_cache .ruff_cache build site *.egg-info
