"""A study: similarity of features along the flow."""
