"""What computes a training step: torch, the perceptron's kernels, or sparse convolutions."""
