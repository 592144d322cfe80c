# Every target sets itself up: the first one on a fresh machine makes .venv (about 4 minutes), later ones reuse it.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo-$(SEED)
SEED ?= 0

export PYTHONDONTWRITEBYTECODE :=  # where it is set, each of a test's many processes would compile all that it imports

NODES ?= 2
DRAWS ?= 1 2 3 4 5 6
JOBS ?= 2
NEXT := .venv-next
RAY ?= ray

.PHONY: demo cluster results drift bench coverage guard mutants test test-next test-slow lint types docs audit unit integration clean

demo: .venv/installed  ## three stages on synthetic scenes: table, results.json, pictures
	$(BIN)/threestage demo --out $(OUT) --seed $(SEED)

cluster: .venv/installed  ## head, nodes, S3 and MLflow on this machine, until Ctrl-C
	$(BIN)/python cluster/local.py --nodes $(NODES)

results: .venv/installed  ## every method on every set: make results SETS="camvid=data/camvid neu_seg=data/neu" WEIGHTS=mobilenetv2_100.pth [DRAWS="1 2" JOBS=2]
	$(BIN)/python -m tests.benchmarks.accuracy --sets $(SETS) --weights $(WEIGHTS) --draws $(DRAWS) --jobs $(JOBS) --test

drift: .venv/installed  ## what models say of themselves without labels, against the truth: make drift DATA=data/camvid MODELS="runs/camvid/stage2/model"
	$(BIN)/python -m tests.benchmarks.drift --data $(DATA) --models $(MODELS)

test: .venv/installed  ## everything that CI runs
	$(MAKE) --jobs=2 --output-sync lint types docs audit
	$(MAKE) guard
	$(MAKE) unit
	$(MAKE) integration

test-next: .venv/installed  ## the tests of Ray with its newest release, or RAY=ray==VERSION, put before .venv's in an environment of its own
	$(BIN)/python -m venv --clear $(NEXT)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" > $$(echo $(NEXT)/lib/python*/site-packages)/beside.pth
	$(NEXT)/bin/python -m pip install -q --ignore-installed --no-deps $(RAY)
	$(NEXT)/bin/python -m pip install -q "ray[default,data,train,tune]"  # what that release needs and .venv lacks
	$(NEXT)/bin/python -c "import ray; print('Ray', ray.__version__)"
	$(NEXT)/bin/python -m pytest -q tests/unit/ray_backend tests/unit/cli/test_submit.py
	$(NEXT)/bin/python -m pytest -q -m integration tests/integration

test-slow: .venv/installed  ## faults and other long tests
	$(BIN)/python -m pytest -q -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

docs: .venv/installed  ## how the pages read, and the site, in runs/site
	$(BIN)/python docs/check_prose.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: .venv/installed  ## what a step, its views, the teacher, evaluation, pseudo-masks and a start cost beside plain ways; JSON in runs/
	mkdir -p runs
	$(BIN)/python -m tests.benchmarks.bench_step --json runs/bench_step.json
	$(BIN)/python -W ignore -m tests.benchmarks.bench_augment --json runs/bench_augment.json
	$(BIN)/python -m tests.benchmarks.bench_ema --json runs/bench_ema.json
	$(BIN)/python -m tests.benchmarks.bench_evaluation --json runs/bench_evaluation.json
	$(BIN)/python -m tests.benchmarks.bench_pseudo_masks --json runs/bench_pseudo_masks.json
	$(BIN)/python -m tests.benchmarks.bench_start --json runs/bench_start.json

guard: .venv/installed  ## the ratios of a few of these against tests/benchmarks/recorded.json
	$(BIN)/python -W ignore -m tests.benchmarks.guard

mutants: .venv/installed  ## which changes of losses, metrics, pseudo-masks, geometry and storage does no test see? (half an hour; mutants/)
	$(BIN)/python -m pip install -q -c constraints.txt mutmut==3.8.1
	$(BIN)/mutmut run --max-children 2
	$(BIN)/mutmut results

coverage: .venv/installed  ## which branches of the package do the tests without Ray take? (a quarter of an hour; a figure to look at)
	$(BIN)/python -m pip install -q -c constraints.txt coverage==7.17.5
	$(BIN)/python -m coverage run --branch --source threestage --data-file runs/coverage -m pytest -q -m "not integration and not slow"
	$(BIN)/python -m coverage report --data-file runs/coverage --skip-covered --sort cover

audit: .venv/installed  ## known holes in what is installed, where their database can be reached
	$(BIN)/python -m tests.audit

unit: .venv/installed  ## without Ray, three at a time, since some wait
	$(BIN)/python -m pytest -q -n 3 --dist loadscope --no-loadscope-reorder -m "not integration and not slow" \
		$(addprefix --ignore=tests/,integration faults fresh benchmarks)

integration: .venv/installed  ## with Ray, one after the other
	$(BIN)/python -m pytest -q -m "integration and not slow" tests/integration

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[dev]"  # what is imported is compiled then
	touch $@

clean:
	rm -rf .venv $(NEXT) runs mutants
