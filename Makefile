PYTHON ?= python3
BIN ?= .venv/bin
PROTO_OUT ?= .

.DEFAULT_GOAL := help
.PHONY: help demo test check protos chart

help: ## show this list
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1\t/p' Makefile

demo: .venv/.installed ## serve the shipped model on a local Ray, ask it something over gRPC, stop
	$(BIN)/model1 demo

test: .venv/.installed-dev ## the default tests: CPU, no network
	@# Three workers: a third of their time is waiting, and two cores are what a small machine has.
	$(BIN)/python -m pytest -n 3 --dist loadfile

check: .venv/.installed-dev ## linters, types, import rules
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy && $(BIN)/lint-imports --no-logo

protos: .venv/.installed-dev ## regenerate protos/*_pb2*
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) \
		--grpc_python_out=$(PROTO_OUT) protos/*.proto

chart: .venv/.installed-dev ## render the chart's golden files again, lint and package it into out/
	$(BIN)/python -m tests.helm.golden
	HELM=$$($(BIN)/python -m tests.helm.helm_binary) && $$HELM lint --strict helm/model1 && \
		$$HELM package helm/model1 --destination out

.venv/.installed: pyproject.toml
	@echo "installing into .venv: a few minutes, once"
	$(PYTHON) -m venv .venv && .venv/bin/pip install -q -e . && touch $@

.venv/.installed-dev: .venv/.installed
	.venv/bin/pip install -q -e '.[dev]' && $(BIN)/python -m tests.helm.helm_binary && touch $@
