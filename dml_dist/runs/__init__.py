"""What a run, and a study of many runs, are on disk: one reader and one writer per file."""
