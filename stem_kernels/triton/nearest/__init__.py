"""The nearest token of each query in Triton."""
