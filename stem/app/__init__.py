"""The page that a browser shows, `stem app`: what it does, it does by the command line."""
