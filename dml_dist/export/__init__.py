"""Export of a trained network as a self-contained bundle, and search in it."""
