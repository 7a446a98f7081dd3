"""Embed a data set and measure how well its classes are retrieved."""
