"""What the simulator's counts are compared with: the bytes of each kernel, and what eager PyTorch launches.

A multiply-add counts as two operations. Sizes are the method's own: B images, K classes, width D, E episodes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rada_fast.config.method import AdapterConfig


def kernel_bytes(config: AdapterConfig, episodes: int, batch: int, classes: int) -> dict[str, int]:
    """For each Triton kernel, the bytes that one launch must read and write.

    Storage is bfloat16, all query kinds are in use, and the penalty is l2. Every episode has weights of its own.
    Statistics are float32: a log-sum of two numbers, a factor and a delta for each row, head and query kind whose
    attention has the shape (B, K, D), and the sum of a logit for each row. Scratch memory counts as nothing, a sum over
    columns counts as one value, and the gradient of a text query, which the images share, counts as one copy.
    """
    width, heads, images = config.embed_dim, config.num_heads, episodes * batch
    rows, matrix = images * classes, config.softmax == "matrix"
    # The bytes of a tensor of the shape (B, K, D), of the text features and of the image features.
    class_rows, text, image = 2 * rows * width, 2 * classes * width, 2 * images * width
    q_text, q_image = episodes * text, 2 * image  # the image query and its attention are float32
    weight = episodes * 2 * width * (width + config.bias)
    statistics, row_sums = 4 * 2 * heads * rows, 4 * rows
    factors = statistics if matrix else 0
    queries = q_text + class_rows + q_image
    attention_reads = queries + 3 * class_rows + statistics  # queries, keys, values, doutput, deltas
    return {
        "rational_projections_forward_kernel": image + text + 5 * weight + queries + 2 * class_rows,
        # Each query kind's result is stored by itself, read again when a head's factors are known, and combined.
        "class_attention_forward_kernel": queries
        + 2 * class_rows
        + 2 * (2 * class_rows + q_image)
        + 2 * (2 * statistics if matrix else statistics)
        + factors
        + class_rows,
        # O, and the mask for the backward pass.
        "masked_logits_forward_kernel": image + text + 2 * class_rows + weight + row_sums + 2 * rows,
        "masked_logits_backward_offset_kernel": image + text + 2 * class_rows + 2 * rows,
        "masked_logits_backward_attended_kernel": class_rows
        + 2 * class_rows
        + factors
        + weight
        + class_rows
        + statistics,
        # Queries, keys and their attention are read once for both gradients.
        "class_attention_backward_kernel": attention_reads
        + (0 if matrix else 2 * statistics)
        + q_image
        + queries
        + 2 * class_rows,
        "parameter_gradients_kernel": image + text + 5 * class_rows + q_text + q_image + 6 * weight,
    }


class EagerCounter(TorchDispatchMode):
    """Counts what eager PyTorch launches under it: kernels, operations of products, and bytes read and written.

    seconds: the sum over all launches of the time that each would take at the given rates.
    """

    def __init__(self, bytes_per_second: float, operations_per_second: float) -> None:
        super().__init__()
        self.launches, self.operations, self.bytes, self.seconds = 0, 0, 0, 0.0
        self._bandwidth, self._peak = bytes_per_second, operations_per_second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            func.is_view
            or func.namespace == "prim"
            or func._schema.name in ("aten::detach", "aten::empty.memory_format")
        ):
            return out
        outputs = [value for value in (out if isinstance(out, tuple | list) else (out,)) if isinstance(value, Tensor)]
        inputs = [value for value in args if isinstance(value, Tensor)]
        if not outputs:
            return out
        # An expanded tensor is read once: its storage counts, not its shape.
        moved = sum(min(value.nbytes, value.untyped_storage().nbytes()) for value in (*inputs, *outputs))
        count = flop_registry.get(func._overloadpacket)
        operations = count(*args, **(kwargs or {}), out_val=out) if count else 0
        self.launches += 1
        self.operations += operations
        self.bytes += moved
        self.seconds += max(moved / self._bandwidth, operations / self._peak)
        return out
