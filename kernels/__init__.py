"""Triton kernels and their launchers, one file per op; installed as rada_fast.kernels."""
