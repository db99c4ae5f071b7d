"""Our models as others' benchmarks take them."""
