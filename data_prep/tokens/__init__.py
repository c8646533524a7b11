"""Clean text in, token ids with sentence and document ends out."""
