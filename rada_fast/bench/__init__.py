"""Measure the kernels: the registers and memory that they compile to, and the tiles that are fastest."""
