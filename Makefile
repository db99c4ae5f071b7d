# PYTHON is the interpreter that creates the virtual environments VENV, VENV-tools and so on.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
PIP_INSTALL := pip install --quiet --progress-bar off

.PHONY: quickstart test test-lowest check check-workflows audit licences docs wheel test-wheel clean

quickstart: $(VENV)/quickstart
	$(BIN)/llm2clip quickstart --out runs/quickstart

test: $(VENV)/ready
	$(BIN)/$(PYTEST)

# Run the tests with the minimum versions in pyproject.toml.
test-lowest: $(VENV)-lowest/ready
	$(VENV)-lowest/bin/$(PYTEST)

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell *.md benchmarks deploy docs examples src tests
	$(BIN)/mypy
	@report=$$($(BIN)/lint-imports) || { echo "$$report"; exit 1; }

# Check the workflows for vulnerabilities, the container file for errors, YAML files against their schemas, and that
# uv.lock matches pyproject.toml.
check-workflows: $(VENV)-tools/ready
	$(VENV)-tools/bin/uv lock --check --offline --quiet
	$(VENV)-tools/bin/zizmor --offline --quiet .github
	$(VENV)-tools/bin/hadolint deploy/Containerfile
	$(VENV)-tools/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)-tools/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(VENV)-tools/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VENV)-tools/bin/check-jsonschema --builtin-schema vendor.github-issue-forms \
	  $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(VENV)-tools/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(VENV)-tools/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# Look up known vulnerabilities of the packages in uv.lock.
audit: $(VENV)-tools/ready
	$(VENV)-tools/bin/uv export --quiet --frozen --all-extras --no-emit-project --output-file $(VENV)-tools/locked.txt
	$(VENV)-tools/bin/pip-audit --disable-pip --progress-spinner off --requirement $(VENV)-tools/locked.txt

# Print the sizes and licences of the installed packages, for docs/licences.md.
licences: $(VENV)/ready $(VENV)-tools/ready
	$(BIN)/python benchmarks/dependencies.py $(VENV)-tools/bin/pip-licenses

docs: $(VENV)/ready
	$(BIN)/mkdocs build --quiet

# Build the source distribution, and from it the wheel, in dist/.
wheel: $(VENV)-tools/ready
	rm -rf dist
	$(VENV)-tools/bin/python -m build
	$(VENV)-tools/bin/twine check --strict dist/*

# Install the wheel from dist/ in an empty environment, and run its commands outside this folder.
test-wheel:
	rm -rf $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/$(PIP_INSTALL) dist/*.whl
	$(VENV)-wheel/bin/python -I tests/wheel_smoke.py

$(VENV)/quickstart: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) -e '.[quickstart,reports]'
	touch $@

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) -e '.[dev]'
	touch $@

$(VENV)-lowest/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/$(PIP_INSTALL) uv
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest --resolution lowest-direct -e '.[dev]'
	touch $@

$(VENV)-tools/ready: .github/requirements.txt
	$(PYTHON) -m venv $(VENV)-tools
	$(VENV)-tools/bin/$(PIP_INSTALL) -r $<
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-tools $(VENV)-wheel dist runs
