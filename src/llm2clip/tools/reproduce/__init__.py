"""Tests of the paper's claims at the scale of the local machine."""
