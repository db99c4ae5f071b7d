"""Tests of the LLM2CLIP paper's claims with small models and data sets on the local machine."""
