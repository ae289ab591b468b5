"""A study: calibrated bases against attention over all frames."""
