"""What the operators and all backends share; imports none of them."""
