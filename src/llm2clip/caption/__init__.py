"""Captions for images, written by a multimodal model: `llm2clip caption`."""
