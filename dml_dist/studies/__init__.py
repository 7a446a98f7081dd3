"""Many runs as one study: the pool that executes them, search, comparison."""
