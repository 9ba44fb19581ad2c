# make demo | test | test-fast | lint | bench | attack | torture | kube | server | install | clean | help. What they need
# is installed by setup/prepare first.
#   make test TESTS=tests/server/test_serve.py K='push and not down'
#   make test JOBS=2      in two processes (three are right for two cores: each waits a good deal; 2 GB each)
#   make test TOTO_CUTS=1     every case and every instant, of which a sample is tried otherwise (three hours)
#   make torture ROUNDS=30 SEQUENCES=500 SEED=1
#   make demo KEEP=1      leaves the demo's server and machines running
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help prepare server install demo test test-fast lint bench attack torture kube clean
TESTS ?=
K ?=
JOBS ?= 3
ROUNDS ?= 30
SEQUENCES ?= 500
SEED ?=
KEEP ?=
export KEEP
run := . setup/env && exec
# Side by side; tests/sessions.py says which share a process. The longest begin first.
beside := -n $(JOBS) --dist loadgroup --no-loadscope-reorder

help:
	@echo "make demo    a fleet of virtual machines: rehearse, roll out, break, revert (KEEP=1 leaves it running)"
	@echo "make test    all tests, in JOBS=3 processes (TESTS=path selects files, K=expression selects names: in one)"
	@echo "make test-fast  those that need no virtual machine and no server, in five minutes; and the floor of coverage"
	@echo "make lint    ruff (check and format), the import contracts, mypy --strict"
	@echo "make bench   measures, as ratios side by side"
	@echo "make torture kills parts of toto at random instants (ROUNDS=30), and sees that nothing is left half done;"
	@echo "             and has random runs on terraform roots fail (SEQUENCES=500), and sees that they harm nothing"
	@echo "make attack  a red team's ways out of toto's cells, all of them; none may reach anything"
	@echo "make kube    builds a Kubernetes API server, for the tests of helm (8 minutes, 3.5 GB while it does; once)"
	@echo "make server  prepares for \`toto serve\` alone, without what only demo and tests need"
	@echo "make install as root, on a server with systemd: the same into /opt/toto-env, and toto's user, units and command"
	@echo "make clean   removes what was generated in the checkout (rm -r ~/.cache/toto removes the rest)"

prepare:
	@setup/prepare

server:
	@setup/prepare server

install:
	@setup/install

demo: prepare
	@$(run) python -m tests.lab.demo

ifeq ($(TESTS)$(K),)
test: test-fast
	@$(run) python -m pytest -m slow $(beside)
else
test: prepare
	@$(run) python -m pytest $(TESTS) $(if $(K),-k '$(K)')
endif

test-fast: prepare
	@$(run) python -m pytest -q -m 'not slow' $(beside) --cov --cov-report=term:skip-covered

lint: prepare
	@. setup/env && ruff check . && ruff format --check . && lint-imports --no-cache && exec mypy --strict

torture: prepare
	@$(run) python -m tests.lab.torture --rounds $(ROUNDS) $(if $(SEED),--seed $(SEED))
	@$(run) python -m tests.terraform.sequences --sequences $(SEQUENCES) $(if $(SEED),--seed $(SEED))

attack: prepare
	@TOTO_ATTACK=1; export TOTO_ATTACK; $(run) python -m pytest tests/attack $(beside)

bench: prepare
	@$(run) python -m bench

kube: prepare
	@setup/kube build

clean:
	@find . -name .git -prune -o -type d \( -name __pycache__ -o -name .mypy_cache -o -name .ruff_cache \
	  -o -name .pytest_cache -o -name .hypothesis -o -name '*.egg-info' \) -prune -exec rm -rf {} +
	@rm -rf build result result-*
