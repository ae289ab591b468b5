"""What one self-attention computes: processors, their hooks, and the chunks that meet in them."""
