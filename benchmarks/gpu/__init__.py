"""Benchmarks of large models on one GPU. They need no checkpoint: weights are random, or trained on the spot."""
