"""A study: the drop-in attention against SDPA."""
