# `make` lists what there is. Overrides: make demo ARGS="steps=50 name=short" · make test ARGS="-k balance"
#
# PYTHON chooses the interpreter that makes .venv. pip's own settings are respected: on Linux without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares a new .venv about 4 GB of CUDA libraries.

PYTHON ?= python3
ARGS ?=

VENV := .venv/bin/python
INSTALLED := .venv/.installed
LINTERS := .venv/.installed-dev
LOG := .venv/setup.log
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV) -m pytest -n auto --dist worksteal --durations=20

.PHONY: help setup demo chat test test-all drills slurm sky gpu lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s  %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED)  ## make .venv and install what constraints.txt pins; again only when the pins change

demo: setup  ## train a small AFMoE on Python's standard library (3 to 4 minutes on 2 cores), export it, let it write
	@$(VENV) -m trainer.train experiment=demo evaluate=unseen $(ARGS)
	@$(if $(filter -h --help --cfg,$(ARGS)),,$(export_demo))

chat: setup  ## let it learn to answer from 296 dialogues about this project, and ask it 3 questions (5 minutes on 2 cores)
	@[ -e runs/demo/checkpoints/latest ] || $(VENV) -m trainer.train experiment=demo evaluate=unseen steps=100
	@$(VENV) -m trainer.train experiment=sft stage.warmup.lr.to=0.5 $(ARGS)
	@$(if $(filter -h --help --cfg,$(ARGS)),,$(ask))

test: setup  ## run the quick tests (5 minutes on 2 cores); what CI runs besides: ARGS="-m slow"
	@$(PYTEST) -m 'not slow and not rare' $(ARGS)

test-all: setup  ## run all tests
	@$(PYTEST) $(ARGS)

drills: setup  ## break runs on purpose and print what held (6 to 9 minutes on 2 cores)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV) -m tests.drills $(ARGS)

slurm: setup  ## the same under a real Slurm on this machine (apt-get install slurmctld slurmd slurm-client munge)
	@$(VENV) -m tests.slurm $(ARGS)

sky:  ## does SkyPilot take launch/skypilot.yaml? In an environment of its own (.venv-sky, 460 MB)
	@[ -x .venv-sky/bin/sky ] || { $(PYTHON) -m venv .venv-sky && .venv-sky/bin/pip install --quiet skypilot==0.14.1; }
	@.venv-sky/bin/python tests/skypilot.py

gpu: setup  ## does this GPU compute what a CPU computes, and how fast? (8 minutes; RANKS=8 for eight GPUs)
	@$(VENV) -m tests.gpu $(ARGS)

lint: $(LINTERS)  ## ruff, pyright, shellcheck, hadolint
	@$(VENV) -m ruff check
	@$(VENV) -m ruff format --check
	@$(VENV) -m pyright
	@.venv/bin/hadolint Dockerfile
	@.venv/bin/shellcheck .ci/run launch/*.sh launch/*.sbatch

clean:  ## remove .venv and caches; runs/ stays
	@rm -rf .venv .venv-sky .pytest_cache .ruff_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(1): a key that ARGS may set, $(2): its value if they do not
given = $(or $(patsubst $(1)=%,%,$(lastword $(filter $(1)=%,$(ARGS)))),$(2))
RUN = $(call given,run_dir,runs)/$(call given,name,demo)

# The newest checkpoint of the run that was just trained; once, so that `make demo` may be repeated. Runs of tokens write no text.
define export_demo
latest=$$(cat '$(RUN)/checkpoints/latest') || exit 1; \
	out='$(RUN)'/export-$${latest#step-}; \
	if [ -e "$$out" ]; then echo "$$out: was exported before"; exit 0; fi; \
	set -- '$(RUN)/checkpoints/'"$$latest" "$$out" --verify; \
	if [ -e '$(RUN)/tokenizer.json' ]; then set -- "$$@" --prompt 'def main():'; fi; \
	$(VENV) -m trainer export "$$@"
endef

# What its dialogues have word for word, what they have in other words, and what they do not have.
QUESTIONS := 'What is Triquetra?' 'Tell me, how do I start a run?' 'What is the capital of France?'
define ask
$(VENV) -m trainer generate '$(call given,run_dir,runs)/$(call given,name,sft)' --chat $(QUESTIONS) || exit 1; \
	echo '4.7 million weights, two minutes and 296 dialogues make a parrot: it knows their sentences, and nothing else.'; \
	echo "talk to it: .venv/bin/triquetra chat '$(call given,run_dir,runs)/$(call given,name,sft)'"
endef

# $(1): the extra of pyproject.toml, $(2): what to tell. The log is shown only on failure.
define install
	@echo "$(2) (log: $(LOG))"
	@$(VENV) -m pip install --no-input -c constraints.txt -e '.[$(1)]' >$(LOG) 2>&1 || { \
	    grep -v 'is ignored: ' $(LOG) | tail -n 40 >&2; \
	    echo "error: pip failed, see $(LOG)" >&2; exit 1; }
	@touch $@
endef

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo "error: $(PYTHON) was not found; choose another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), Triquetra needs 3.11 or newer; choose another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $(PYTHON) has no venv module; Debian and Ubuntu have it in the package python3-venv" >&2; exit 1; }
	@$(VENV) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(call install,test,Installing into .venv: one to three minutes and longer where torch brings CUDA ...)

$(LINTERS): $(INSTALLED)
	$(call install,dev,Installing pyright and shellcheck into .venv ...)
