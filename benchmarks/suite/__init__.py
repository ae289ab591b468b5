"""The GPU suite: correctness, times and memory of everything on a machine with a GPU."""
