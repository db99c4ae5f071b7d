"""A vision tower inside a multimodal LLM, LLaVA-1.5 (arXiv 2310.03744): built from parts of transformers, trained."""
