"""Training: mesh, step, loop, loss, evaluation, checkpoints, processes."""
