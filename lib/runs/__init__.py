"""Trains what is missing, here, on a cluster or on ImageNet; executes the notebooks."""
