"""A study: what spares the memory of a small card, by a whole edit's peak."""
