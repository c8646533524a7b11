"""Documents in, clean and distinct text out."""
