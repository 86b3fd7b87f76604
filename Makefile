# Each target does all of its set-up, in an environment of its own. Variables: PYTHON, TORCH_VERSION
# (the torch to install there), and what setup.py reads (CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, ...).
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# Named in every installation, so that no dependency moves it.
TORCH := torch==$(TORCH_VERSION)
BUILD_TOOLS := 'setuptools>=77' 'cmake>=3.25' ninja pybind11

.PHONY: demo test install environment clean

demo: install
	$(VENV)/bin/lora-ext demo

test: export LORA_EXT_TEST_BUILD = 1
test: install
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

install: environment
	$(PIP) install -q $(TORCH) '.[hf,test]' --no-build-isolation
	@$(VENV)/bin/python -c 'import lora_ext._library as lib; print(lib.describe_build())'

environment: $(VENV)/torch-$(TORCH_VERSION)
$(VENV)/torch-$(TORCH_VERSION):
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH) numpy $(BUILD_TOOLS)
	rm -f $(VENV)/torch-* && touch $@

clean:
	rm -rf build dist $(VENV)
