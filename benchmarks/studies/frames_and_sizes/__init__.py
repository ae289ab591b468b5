"""A study: seconds and memory of a UNet step by frames and size."""
