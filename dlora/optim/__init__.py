"""Parameter groups, learning-rate schedules, and the optimizers that torch does not have."""
