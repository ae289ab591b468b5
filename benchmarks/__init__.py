"""Benchmarks: every timing stands beside a check of its result. `make bench` runs them."""
