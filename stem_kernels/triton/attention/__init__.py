"""Attention to bases in Triton."""
