"""Where what waits is kept, and the memory that there is."""
