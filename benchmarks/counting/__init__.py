"""Kernels judged without a GPU: from their machine code, and from their launches."""
