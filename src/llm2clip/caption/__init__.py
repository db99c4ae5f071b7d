"""Image captioning with a multimodal model: `llm2clip caption`."""
