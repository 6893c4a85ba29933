"""Triton kernels and their launchers, one module or package per op; installed as rada_fast.kernels.

A name that ends in _kernel is a Triton entry point. The launcher beside it, which takes PyTorch tensors, is called
<op>_forward or <op>_backward; parameter_gradients is a backward pass alone.

Every entry point takes its parameters in this order, and launchers pass them by name:

1. tensors that are read, in the order of the equations, then tensors that are written; where an argument is None, the
   code that would use it is left out when the kernel is compiled;
2. numbers: sizes, then strides, then factors such as `scale` and `share` (one over the number of query kinds); those
   that _launch.NUMBERS lists do not make Triton compile a kernel again when their values change;
3. compile-time constants: sizes (D, HEAD), options, blocks (BLOCK_M rows, BLOCK_N columns, BLOCK_C columns of a step of
   a reduction, ...), and the type and precision of products (COMPUTE, PRECISION).

The docstrings share these symbols: B images, K classes, E episodes and H heads; f the image features (B, D), T the text
features (K, D), s the logit scale, R[b, k] = f[b] * T[k] the rational matrix; |Q| the number of query kinds in use
(image, text, rational), d the width of a head and tau the temperature. dX is the loss's gradient with respect to X.
"""

from rada_fast import _env

_env.keep_fused_multiply_adds()
_env.pass_target_to_triton()
