"""Decoding on a GPU: paging and computing inside CUDA graphs. Imported only where Triton is installed."""
