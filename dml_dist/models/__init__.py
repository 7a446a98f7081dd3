"""Embedding networks: backbone, pooling and linear head."""
