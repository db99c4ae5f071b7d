"""Adapters for evaluating llm2clip models with other projects' benchmark suites."""
