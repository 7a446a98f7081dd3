"""Ranks that work together: process group, collectives, and class tables sharded over ranks."""
