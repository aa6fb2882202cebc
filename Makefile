# make reproduce   set up, then train and evaluate S²HAND on synthetic hands (under 15 minutes on 2 cores)
# make test        set up, then every test that needs no browser
# make test-browser  set up (Chromium too), then the explorers, JupyterLab and the book in a browser
# make lab         set up, then JupyterLab on the lessons
# make explore     set up, then the explorers as web pages: sliders instead of code
# make handbook    set up, then the book: handbook/_build/html/index.html
# make env         the set-up alone
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OUT    ?= runs/s2hand-quick
# Idle OpenMP threads sleep instead of spinning: on busy cores that is several times faster, on idle ones no slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help env system-libraries reproduce test test-browser lab explore handbook clean
help:
	@sed -n 's/^# //p' Makefile

env: $(READY)

# torch first and by its exact version: a bare requirement would pull whatever build is newest.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'import cv2' 2>/dev/null || $(MAKE) --no-print-directory system-libraries
	@touch $@
	@echo "ready: $$($(BIN)/python --version), torch $$($(BIN)/python -c 'import torch; print(torch.__version__)')"

# OpenCV's wheel links against two system libraries that bare images lack.
system-libraries:
	apt-get update -qq && apt-get install -qq -y libgl1 libglib2.0-0

reproduce: $(READY)
	$(BIN)/handrecon reproduce s2hand --profile quick --out $(OUT) --resume

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --ignore-glob='*browser.py' tests

# HANDRECON_BROWSER demands what the tests skip elsewhere.
test-browser: $(READY)
	@command -v chromium >/dev/null || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium >/dev/null)
	HANDRECON_BROWSER=1 $(BIN)/python -m pytest -s tests/test_browser.py tests/test_handbook_browser.py

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir nbs

explore: export JUPYTER_PATH := $(CURDIR)/nbs/explore/.voila
explore: export JUPYTER_CONFIG_PATH := $(JUPYTER_PATH)
explore: $(READY)
	$(BIN)/voila nbs

handbook: $(READY)
	rm -rf handbook/_build
	$(BIN)/python handbook/stage.py
	$(BIN)/python -m sphinx -q -W --keep-going -c handbook handbook/_build/source handbook/_build/html
	@echo "the book: handbook/_build/html/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info handbook/_build
