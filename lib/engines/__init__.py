"""Ways to compute a training step: as CUDA graphs, and over the non-zeros by `lib.kernels`."""
