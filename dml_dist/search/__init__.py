"""Exact nearest neighbors over gallery shards: proposed in float32, decided in float64."""
