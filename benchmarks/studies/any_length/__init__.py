"""A study: videos of any length: memory, throughput, bases of a few frames, streams."""
