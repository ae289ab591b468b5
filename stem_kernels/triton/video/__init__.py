"""Attention of video transformers in Triton: window, bases of all tokens, and their moments."""
