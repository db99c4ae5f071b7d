"""llm2clip: give any CLIP a large language model's understanding of text (LLM2CLIP, arXiv 2411.04997)."""
