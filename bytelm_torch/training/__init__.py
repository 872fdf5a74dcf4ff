"""Training: step, loop, loss, evaluation, checkpoints."""
