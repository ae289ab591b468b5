"""How the embedded model was made: its training, its evaluation, its card."""
