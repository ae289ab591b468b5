"""A study: inversions by method and by STEM's options."""
