"""Metrics as partial, merge and finish, on plain arrays."""
