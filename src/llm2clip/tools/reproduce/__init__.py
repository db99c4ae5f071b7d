"""Test the paper's claims with small models and data sets on the local machine."""
