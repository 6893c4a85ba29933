"""Triton kernels and their launchers, one file per op; installed as rada_fast.kernels."""

from rada_fast import _env

_env.keep_fused_multiply_adds()
