"""Choose how many images a part of a training step has, so that it fits into a budget of memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rada_fast.config.method import AdapterConfig

BUDGETS = {"cpu": 2**30, "cuda": 2**33}
"""The bytes that the adapter may take for the images of one part of a step, by the type of the device; see
images_at_once. Larger parts are not faster: some tens of images fill a processor."""


class PartBytes(NamedTuple):
    """Say about how many bytes a head takes for n images: ``fixed + n each + min(n, chunk) working``.

    each: what is kept for an image from its forward to its backward pass, or all that an image takes.
    fixed: what does not depend on the number of images.
    chunk, working: the backward pass goes through so many images at a time, each of which takes so many bytes then.
    """

    each: int
    fixed: int = 0
    chunk: int = 0
    working: int = 0

    def of(self, images: int) -> int:
        """Return the bytes of so many images."""
        return self.fixed + images * self.each + min(images, self.chunk) * self.working

    def images(self, budget: int) -> int:
        """Return how many images fit into so many bytes, perhaps 0."""
        if budget < self.of(self.chunk):
            return max(0, budget - self.fixed) // (self.each + self.working)
        return (budget - self.fixed - self.chunk * self.working) // self.each


def part_bytes(
    config: AdapterConfig | None, classes: int, device: torch.device, *, itemsize: int = 4, fused: bool = True
) -> PartBytes:
    """Return about how many bytes a head takes for the images of a part, in a forward and a backward pass.

    With K classes, width D, H heads of width d and b bytes for a number, plain PyTorch takes ``12 K D b`` for each
    image: five tensors (K, D) that are kept for the backward pass, and seven of it. Without a fused operator, attention
    keeps scores, probabilities and their gradients for each kind of query as well, ``4 |Q| H K^2 b``.

    The operator for CPUs keeps ``6 K D b`` for each image, and its backward pass takes max(2048 / K, 4 threads / H) of
    them at a time, with ``8 K D b`` for each. Beside the images it takes ``(12 D^2 + 8 K D) b`` for weights that it
    transposes, gradients and text features, and ``(12 K d + 2^20) b`` for each thread.

    Another head, which has no config, has little more than the logits and their gradients.

    config: the arithmetic of the rational adapter, or None for another head.
    fused: whether a fused operator computes it.
    """
    if config is None:
        return PartBytes(4 * classes * itemsize)
    rows = classes * config.embed_dim * itemsize
    if fused and device.type == "cpu":
        threads, width = torch.get_num_threads(), config.embed_dim
        fixed = 12 * width**2 * itemsize + 8 * rows + threads * (12 * classes * config.head_dim + 2**20) * itemsize
        # This is chunk_of in csrc/cpu/rational_adapter.cpp.
        chunk = max(-(-2048 // classes), -(-4 * threads // config.num_heads))
        return PartBytes(6 * rows, fixed, chunk, 8 * rows)
    scores = 0
    if not fused and config.mask_function == "attention":
        scores = 4 * len(config.queries) * config.num_heads * classes**2 * itemsize
    return PartBytes(12 * rows + scores)


def images_at_once(
    config: AdapterConfig | None,
    classes: int,
    device: torch.device,
    *,
    itemsize: int = 4,
    fused: bool = True,
    extra: int = 0,
    budget: int | None = None,
) -> int:
    """Return how many images a part of a step may have, so that it takes no more than a budget; at least one.

    The other arguments are those of part_bytes.

    extra: what an image takes outside of the head.
    budget: the bytes, or None for those of BUDGETS.
    """
    bytes_of = part_bytes(config, classes, device, itemsize=itemsize, fused=fused)
    bytes_of = bytes_of._replace(each=bytes_of.each + extra)
    return max(1, bytes_of.images(budget or BUDGETS[device.type]))
