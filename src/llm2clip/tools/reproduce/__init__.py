"""Tests of the LLM2CLIP paper's claims on the local machine, with small models and data sets."""
