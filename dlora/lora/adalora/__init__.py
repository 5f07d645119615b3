"""The mathematics of AdaLoRA's budget: schedule, importance of a triplet, orthogonality."""
