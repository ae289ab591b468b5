"""A study: attention by a window and bases, as video transformers have it, against SDPA."""
