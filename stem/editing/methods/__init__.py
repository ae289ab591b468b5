"""The methods of `run_edit`: a module for each, and what is theirs alone."""
