"""Exact nearest neighbours over gallery shards: proposed in float32, decided in float64."""
