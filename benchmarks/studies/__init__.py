"""A folder a study: run, measure, variants, report."""
