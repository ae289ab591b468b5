"""What lies between a pipeline and an inversion or an edit: its parts, its schedule, its hashes."""
