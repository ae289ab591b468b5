"""The torch backend: the operators straight from the formulas, chunked over tokens."""
