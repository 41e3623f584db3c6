"""Trains what is missing, ImageNet by torchrun; executes the notebooks."""
