# Run `make help` for the list of targets. Each is one word, for developers and for .ci/run alike.
# Recipes are plain shell: .ci/run executes them without make, if make is not installed.

.PHONY: help setup check lint format types words fix test goldens site user clients corpus coverage size

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

setup: ## create .venv with the package (editable) and all tools
	python3 -m venv .venv
	.venv/bin/pip install --editable '.[test]' pre-commit
	.venv/bin/pre-commit install
	@echo 'now run: . .venv/bin/activate'

check: lint format types words ## all checks that need no model: lint, format, types, words

lint: ## ruff check
	ruff check .

format: ## ruff format, without changing files
	ruff format --check .

types: ## mypy, strict on src
	mypy
	mypy --strict tools

words: ## words that the vocabulary replaces, in names, messages and docs
	python tools/check_words.py

fix: ## apply what ruff can fix
	ruff check --fix .
	ruff format .

test: ## all tests
	pytest

goldens: ## rewrite tests/golden; read the difference before you commit
	pytest tests/test_golden.py --update-goldens
	git diff --stat tests/golden

site: ## build the docs as a site, in build/site; installs what that needs
	pip install --quiet '.[docs]'
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet

user: ## run the README as a new user, in a fresh virtual environment; tools/new_user.py runs the docs too
	python tools/new_user.py README.md

clients: ## run OpenVINO and onnxruntime-genai on three small models; installs them on first use
	@for client in openvino genai; do \
	    code=0; \
	    python tests/clients/run.py "$$client" --environments "$${CLIENT_ENVIRONMENTS:-.venv/clients}" \
	        --models tests/corpus/llama_dynamo_sdpa.onnx tests/corpus/gpt2_torchscript_sdpa.onnx \
	        tests/corpus/gemma2_dynamo_eager.onnx || code=$$?; \
	    if [ $$code = 4 ]; then echo "SKIPPED: $$client cannot be installed from here"; \
	    elif [ $$code != 0 ]; then exit $$code; fi; \
	done

corpus: ## inject and verify a sample of the corpus, if there is one at $CORPUS
	@corpus=$${CORPUS:-../shared/corpus}; \
	if [ ! -d "$$corpus" ]; then echo "SKIPPED: no corpus at $$corpus"; exit 0; fi; \
	python benchmarks/coverage.py "$$corpus" --sample 24 && python benchmarks/pipelines.py "$$corpus" --rows 24

coverage: ## inject and verify the whole corpus, and rewrite docs/coverage.md
	python benchmarks/coverage.py "$${CORPUS:-../shared/corpus}" --markdown docs/coverage.md

size: ## lines per folder of src, longest last
	@find src -name '*.py' -exec wc -l {} + | sort -n | tail -20
