"""The work of one run on one rank; knows no launcher."""
