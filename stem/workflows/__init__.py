"""What a command does from end to end: several inversions, edits, evaluations, studies."""
