"""Training: the state, the update rule, the compiled step, and the loop, checkpoints and reports around it."""
