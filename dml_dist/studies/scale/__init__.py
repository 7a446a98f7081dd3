"""`dml-dist scale`: measure how speed, memory and results depend on sizes, and model them."""
