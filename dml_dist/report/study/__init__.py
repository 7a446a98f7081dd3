"""Pages of studies: tables, figures and statistics over many runs."""
