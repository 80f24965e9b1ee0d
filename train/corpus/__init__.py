"""The nano model's corpus: grammar, conversations, voices and the files that they become."""
