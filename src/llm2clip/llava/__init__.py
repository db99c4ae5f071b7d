"""LLaVA-1.5 (arXiv 2310.03744) with any vision tower and causal LLM: build, train, generate and evaluate."""
