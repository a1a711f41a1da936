"""Stock checkpoints that other programs load."""
