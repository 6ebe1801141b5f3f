"""Pre-training and distillation: one loop, on Ray Train or in this process."""
