"""Raw files in, documents out."""
