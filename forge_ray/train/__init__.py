"""Training: the step, its optimizers, slots, checkpoints, and Ray Train around them."""
