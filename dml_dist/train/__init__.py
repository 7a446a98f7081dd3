"""The training loop and its parts: plan, optimiser, step, state, checkpoints."""
