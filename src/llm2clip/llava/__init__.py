"""Build, train, run and evaluate LLaVA-1.5 models (arXiv 2310.03744) with any vision tower and causal LLM."""
