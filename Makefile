# make qat: set up and run the main job. make test: set up and test.
# make test-lowest: the same with the lowest versions that setup.cfg allows (with
# PYTHON of 3.11, for which they have wheels).
# make test-python PYTHON=python3.13: the same on another Python.
# make consumers: install llama.cpp, transformers, mlx-lm and gemma, each in an
# environment of its own, and check that they read what is exported.
# make bench: measure what benchmarks/ claims; with TORCH_PYTHON=PATH (a Python
# that has torch, torchao and transformers) against PyTorch, too.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
WORKDIR ?= runs/270m
CONFIG ?= experiments/configs/gemma3_270m_cpu.py
# Where the consumers' environments go; more flags of check.py, such as --only=.
CONSUMERS ?= .venv-consumers
CHECK ?=
# More flags of benchmarks/run_all.py, such as --only=qat_tax or --on=gpu.
TORCH_PYTHON ?=
BENCH ?=

.PHONY: qat test test-lowest test-python lint consumers bench clean

PYTEST = -m pytest -n 2 --dist loadfile --no-loadscope-reorder

qat: $(VENV)/.installed
	$(VENV)/bin/gemma-qat run --config=$(CONFIG) --workdir=$(WORKDIR)

test: $(VENV)/.installed-test lint
	$(VENV)/bin/python $(PYTEST)

test-lowest: $(LOWEST)/.installed-test
	$(LOWEST)/bin/python $(PYTEST)

# Each Python has an environment of its own.
test-python:
	$(MAKE) test PYTHON=$(PYTHON) VENV=.venv-py$(shell $(PYTHON) -c \
	    'import sys; print("%d.%d" % sys.version_info[:2])')

lint: $(VENV)/.installed-test
	$(VENV)/bin/lint-imports

consumers: $(VENV)/.installed $(CONSUMERS)/llama.cpp-source/.installed \
    $(foreach c,llama.cpp transformers mlx gemma,$(CONSUMERS)/$(c)/.installed)
	$(VENV)/bin/python experiments/consumers/check.py \
	    --venvs=$(CONSUMERS) $(CHECK)

bench: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.run_all \
	    $(if $(TORCH_PYTHON),--torch_python=$(TORCH_PYTHON)) $(BENCH)

# Without GGML_NATIVE=OFF, quantized models die of illegal instructions on some
# virtual machines. llama.cpp takes about 9 minutes to build, once.
$(CONSUMERS)/%/.installed: export CMAKE_ARGS = -G Ninja \
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
    -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
$(CONSUMERS)/%/.installed: experiments/consumers/requirements/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -r $<
	touch $@

# Holds convert_hf_to_gguf.py, which no wheel has.
SOURCE = llama_cpp_python-0.3.36
$(CONSUMERS)/llama.cpp-source/.installed:
	mkdir -p $(@D)
	$(PYTHON) -m pip download -q --no-deps --no-binary :all: -d $(@D) \
	    llama-cpp-python==0.3.36
	tar -xzf $(@D)/$(SOURCE).tar.gz -C $(@D) --strip-components=3 \
	    $(SOURCE)/vendor/llama.cpp
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: setup.cfg constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $(VENV)/.installed $@

# Anew each time: what was raised meanwhile must not stay.
$(LOWEST)/.installed-test: setup.cfg .ci/lowest.py
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lowest.py setup.cfg > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install -q -c $(LOWEST)/lowest.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) .venv-py* $(CONSUMERS)
