"""Training of block drafters: data from the target itself, losses, the loop, checkpoints."""
