"""A study: edits with exact answers, by method."""
