"""Decoding on a GPU: paging and computing inside CUDA graphs. What contains kernels needs Triton, which comes with torch
for CUDA; nothing else of the project imports those modules before a GPU is in use.
"""
