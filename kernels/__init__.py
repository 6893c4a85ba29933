"""Triton kernels and their launchers, one file per op; installed as rada_fast.kernels."""

import os

# Triton 3.9 warns, and 3.10 turns fused multiply-adds off, unless told; these kernels are made for them.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
