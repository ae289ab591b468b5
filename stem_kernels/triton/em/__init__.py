"""EM in Triton: passes over tokens, and the update of the bases."""
