"""Parameter groups and learning-rate schedules; optimizers themselves are torch's."""
