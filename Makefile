# Two commands do everything on a CPU machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# Pinned for the CPU; on a GPU machine: make TORCH="torch" ...
TORCH  ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help install quickstart video images puzzles test test-slow test-gpu lint format docs bench bench-learning ablation bench-thinking bench-images bench-captions bench-video bench-puzzles bench-inference bench-serving bench-data validate-gpu clean

help:            ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

install: $(VENV)/.installed  ## make .venv and install everything

$(VENV)/.installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23" "setuptools<81" wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

quickstart: install  ## prepare real text, pretrain an EBT and a Transformer++, evaluate, write a report
	$(BIN)/python -m examples.quickstart

video: install   ## films and games: next-frame EBTs and a Transformer++, trained, evaluated, a report (INPUT="*.mp4" for your own)
	$(BIN)/python -m examples.video $(if $(INPUT),--input '$(INPUT)')

images: install  ## pictures: EBTs and DiTs that denoise and make them, a report (INPUT=... for your own)
	$(BIN)/python -m examples.images $(if $(INPUT),--input '$(INPUT)')

puzzles: install  ## Sudoku of 6 x 6: an energy of the whole grid, its recurrent twin and a feed-forward network, a report
	$(BIN)/python -m examples.puzzles

test: install    ## the test suite (CPU, under 12 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m slow

test-gpu: install   ## the tests that need a CUDA device
	$(BIN)/python -m pytest tests -m gpu

lint: install    ## ruff, mypy and the import contracts of pyproject.toml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install    ## the documentation's site in build/site, an API page for each module; a broken link is an error
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

bench: install   ## training-step time and memory: dual stream, double backward, Transformer++
	$(BIN)/python -m benchmarks.step

bench-learning: install  ## what S1, S2 and Transformer++ learn from the quickstart's shards, three seeds each (about 50 minutes)
	$(BIN)/python -m benchmarks.learning

ablation: install  ## S2 without each of its parts, three seeds each: the paper's ablation at the quickstart's size
	$(BIN)/python -m benchmarks.learning --ablation

bench-thinking: install  ## the evaluation suite of S1 and S2, three seeds, beside three Transformer++, on other text near to far
	$(BIN)/python -m benchmarks.thinking

bench-images: install  ## denoising EBTs and DiTs on Fashion-MNIST, three seeds each: passes, probes, other pictures
	$(BIN)/python -m benchmarks.images

bench-captions: install  ## pictures made from captions by an EBT and a DiT, three seeds: do they show what is said
	$(BIN)/python -m benchmarks.captions

bench-video: install  ## next-frame EBTs and Transformer++ on the films of `make video`, three seeds each
	$(BIN)/python -m benchmarks.video

bench-puzzles: install  ## where thinking pays: 6 x 6 Sudoku, several seeds, at equal updates and equal FLOPs
	$(BIN)/python -m benchmarks.puzzles

bench-inference: install  ## the time of a new token: against the prefix, the candidates and Transformer++
	$(BIN)/python -m benchmarks.inference

bench-serving: install  ## ebt-serve over a socket: 200 requests one at a time and sixteen at a time
	$(BIN)/python -m benchmarks.serving

bench-data: install  ## the loader against plain webdataset (and energon, if installed), and preparation
	$(BIN)/python -m benchmarks.data

validate-gpu: install  ## the first hour on a GPU: what is right, then how fast; pieces of nine minutes, resumable
	$(BIN)/python -m benchmarks.gpu_validate

clean:           ## remove what the commands above made (not the shards and runs)
	rm -rf build *.egg-info .pytest_cache .mypy_cache .import_linter_cache .grimp_cache .ruff_cache .hypothesis $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
