"""Quickstart that trains an emoji search engine with an LLM text tower on a small but real data set."""
