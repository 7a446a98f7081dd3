"""A trained network as a bundle that stands alone, and search in it."""
