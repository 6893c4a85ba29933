"""Images as points of a plane, so that images lie close together whose rational matrices are alike."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NO_TSNE = "principal components (t-SNE needs scikit-learn: pip install 'rada_fast[inspect]')"
BLOCK_ELEMENTS = 2**24
"""The largest number of elements of the matrices whose products are added at once: 64 MiB in float32."""
COMPONENTS = 50
"""The number of principal components that t-SNE starts from, as its authors recommend."""


class Projection(NamedTuple):
    """The places of images in a plane.

    points: the places (N, 2).
    method: the name of the method that has found them.
    same_class: the share of the images whose nearest other image is of the same class, among those whose class has
        another image, or None if there are none. The nearest one is that of the whole matrices, not of the plane.
    """

    points: np.ndarray
    method: str
    same_class: float | None


def inner_products(images: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the inner products of all pairs of rational matrices, as (N, N) in float64.

    images: the features f (N, D); text: the text features T (K, D).
    mask: the masks M (N, K, D) by which the matrices are multiplied, or None for R itself.
    """
    if mask is None:
        # <f_i * T, f_j * T> is the inner product of features whose dimensions have the weights sum_k T_kd^2.
        weighted = images.double() * text.double().square().sum(dim=0)
        return weighted @ images.double().T
    found = images.new_zeros(len(images), len(images), dtype=torch.float64)
    step = max(1, BLOCK_ELEMENTS // images.numel())
    for first in range(0, len(text), step):
        part = (mask[:, first : first + step] * images[:, None] * text[first : first + step]).flatten(1)
        found += (part @ part.T).double()
    return found


def principal_components(products: Tensor, count: int) -> np.ndarray:
    """Return the coordinates (N, count) along the axes of largest variance, from the inner products of all pairs."""
    centred = products - products.mean(dim=0) - products.mean(dim=1, keepdim=True) + products.mean()
    values, vectors = torch.linalg.eigh(centred)
    best = vectors[:, -count:].flip(-1) * values[-count:].flip(-1).clamp(min=0).sqrt()
    # An axis has no direction of its own: the largest coordinate is made positive.
    signs = best.gather(0, best.abs().argmax(dim=0, keepdim=True)).sign()
    return torch.nn.functional.pad(best * torch.where(signs == 0, 1.0, signs), (0, count - best.shape[1])).numpy()


def project(products: Tensor, labels: Tensor, *, perplexity: float, seed: int) -> Projection:
    """Place images in a plane: by t-SNE where scikit-learn is installed, otherwise by two principal components.

    products: the inner products of all pairs (N, N); labels: the classes of the images (N,).
    perplexity: about how many neighbours of an image count in t-SNE; fewer are taken of few images.
    seed: the seed of t-SNE.
    """
    count = len(products)
    squares = products.diagonal()
    distances = squares[:, None] + squares - 2 * products
    distances.fill_diagonal_(float("inf"))
    not_alone = (labels[:, None] == labels).sum(dim=1) > 1
    right = (labels[distances.argmin(dim=1)] == labels)[not_alone]
    same = float(right.double().mean()) if len(right) else None
    if find_spec("sklearn") is None:
        return Projection(principal_components(products, 2), NO_TSNE, same)
    if count < 4:
        return Projection(principal_components(products, 2), "principal components (t-SNE needs four images)", same)
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    start = principal_components(products, min(COMPONENTS, count))
    used = min(perplexity, (count - 1) / 3)
    # The unit of the matrices has no meaning, and t-SNE's first steps depend on it.
    start /= max(start[:, 0].std(), 1e-12)
    # So few points are slower with several threads, which wait for each other in every step.
    with threadpool_limits(1):
        points = TSNE(perplexity=used, init="pca", random_state=seed, n_jobs=1).fit_transform(start.astype(np.float32))
    return Projection(points, f"t-SNE, perplexity {used:.3g}", same)
