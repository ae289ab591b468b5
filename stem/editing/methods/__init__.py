"""The methods of `run_edit`, a module for each, and the mask of `fusion`."""
