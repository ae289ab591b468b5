"""What edits do to attention: maps of words and of tokens, kept, mapped and put in."""
