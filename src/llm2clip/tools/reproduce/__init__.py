"""Test the claims of the LLM2CLIP paper on the local machine, with small models and data sets."""
