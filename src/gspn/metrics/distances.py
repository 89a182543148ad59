"""Distances between two sets of features: Frechet distance, kernel distance, precision and recall; and the score of a
classifier's probabilities. All are computed in float64, for features of any kind (see features.py).
"""

import numpy as np
import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as published
NEIGHBOUR = 3  # of precision and recall, as published
SPLITS = 10  # of the score, as published
SEED = 2020  # torch-fidelity's, so that the same features give the same numbers
ROWS = 2048  # rows of a distance matrix at a time


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), of two means (d,) and covariances (d, d).

    The trace of the root is the sum of the singular values of sigma1^(1/2) sigma2^(1/2), which are real also where a
    covariance is singular. Errors: ValueError for other shapes, or values that are no numbers.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(each, dtype=np.float64) for each in (mu1, sigma1, mu2, sigma2))
    d = mu1.size
    if mu1.shape != (d,) or mu2.shape != (d,) or sigma1.shape != (d, d) or sigma2.shape != (d, d):
        shapes = ", ".join(str(each.shape) for each in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"expected mean (d,), covariance (d, d), twice with the same d, got {shapes}")
    if not all(np.isfinite(each).all() for each in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or a covariance holds values that are no finite numbers")
    shared = np.linalg.svd(_root(sigma1) @ _root(sigma2), compute_uv=False).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * shared
    return max(float(distance), 0.0)


def _root(sigma):
    """The symmetric root of a covariance (d, d). Eigenvalues below d * eps * the largest are rounding: they count as 0.

    Rounding leaves 1e-16 of an eigenvalue of 0, and the root makes 1e-8 of it: half of the digits would be lost, in a
    way that depends on the BLAS.
    """
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    values[values < len(values) * np.finfo(np.float64).eps * values[-1]] = 0
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def kernel_distance(samples: Tensor, reference: Tensor) -> tuple[float, float, int]:
    """The unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, over SUBSETS random subsets.

    Args: features (N, d) and (M, d). Returns: (mean, standard deviation, size of the subsets: SUBSET_SIZE or, where
    there are fewer images, all of the smaller set). Errors: ValueError if a set has fewer than two.
    """
    size = min(SUBSET_SIZE, len(samples), len(reference))
    if size < 2:
        raise ValueError(f"expected two images in each set, got {len(samples)} and {len(reference)}")
    samples, reference = samples.double(), reference.double()
    chosen, values = np.random.RandomState(SEED), []
    for _ in range(SUBSETS):
        x, y = (each[chosen.choice(len(each), size, replace=False)] for each in (samples, reference))
        within = [_kernel(each, each) for each in (x, y)]
        apart = sum((k.sum() - k.diagonal().sum()) for k in within) / (size * (size - 1))
        values.append((apart - 2 * _kernel(x, y).mean()).item())
    return float(np.mean(values)), float(np.std(values)), size


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """(part of the samples near the reference, part of the reference near the samples), of features (N, d) and (M, d).

    An item is near a set if it is at most as far from some item of the set as that item's NEIGHBOUR-th nearest
    neighbour within the set. Errors: ValueError if a set has no such neighbour.
    """
    if min(len(samples), len(reference)) <= NEIGHBOUR:
        raise ValueError(f"expected more than {NEIGHBOUR} images in each set, got {len(samples)} and {len(reference)}")
    samples, reference = samples.double(), reference.double()
    return _share_near(samples, reference), _share_near(reference, samples)


def _share_near(items, others):
    """The part of `items` (N, d) that is near `others` (M, d); distances that differ by rounding alone are equal.

    cdist computes |x|^2 + |y|^2 - 2 x.y, whose rounding is d * eps * the largest |x|^2. Without that allowance it would
    depend on the BLAS whether a copy, or one of several equal items, is near.
    """
    centre = others.mean(0)  # keeps the distances and makes the norms, and so the rounding, small
    items, others = items - centre, others - centre
    largest = max(each.square().sum(1).max() for each in (items, others))
    rounding = items.shape[1] * torch.finfo(items.dtype).eps * largest
    radius = torch.cat([torch.cdist(rows, others).kthvalue(NEIGHBOUR + 1).values for rows in others.split(ROWS)])
    limit = radius.square() + rounding
    near = [(torch.cdist(rows, others).square() <= limit).any(1) for rows in items.split(ROWS)]
    return torch.cat(near).double().mean().item()


class Moments:
    """Number, mean and covariance of features, from batches.

    Attributes: count; mean, float64 (d,); scatter, float64 (d, d): the sum of (x - mean)(x - mean)^T.
    """

    def __init__(self, count: int, mean: Tensor, scatter: Tensor):
        self.count, self.mean, self.scatter = count, mean, scatter

    @classmethod
    def empty(cls, d: int) -> "Moments":
        return cls(0, torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64))

    def add(self, features: Tensor) -> None:
        """Adds features (B, d)."""
        if not len(features):
            return
        features = features.double()
        mean, total = features.mean(0), self.count + len(features)
        centred, step = features - mean, mean - self.mean
        self.scatter += centred.T @ centred + torch.outer(step, step) * (self.count * len(features) / total)
        self.mean += step * (len(features) / total)
        self.count = total

    def covariance(self) -> Tensor:
        """The covariance with divisor count - 1. Errors: ValueError with fewer than two images."""
        if self.count < 2:
            raise ValueError(f"a covariance takes two images, got {self.count}")
        return self.scatter / (self.count - 1)


class Score:
    """exp of the mean divergence of p(class | image) from p(class), in each of SPLITS parts of the images: the
    Inception Score, if the probabilities are Inception's. An image's part is a function of its index and the number of
    images.

    Attributes: part int64 (N,); count (S,); probability (S, K): its sum; entropy (S,): the sum of p log p; float64.
    """

    def __init__(self, images: int, classes: int):
        splits = min(SPLITS, images)
        position = np.empty(images, dtype=np.int64)
        position[np.random.RandomState(SEED).permutation(images)] = np.arange(images)
        edges = np.array([i * images // splits for i in range(1, splits)])
        self.part = torch.from_numpy(np.searchsorted(edges, position, side="right"))
        self.count, self.entropy = (torch.zeros(splits, dtype=torch.float64) for _ in range(2))
        self.probability = torch.zeros(splits, classes, dtype=torch.float64)

    def add(self, index: Tensor, logits: Tensor) -> None:
        """Adds the images `index` (B,) with a classifier's logits (B, K)."""
        part, logs = self.part[index], logits.double().log_softmax(1)
        p = logs.exp()
        self.count.index_add_(0, part, torch.ones(len(part), dtype=torch.float64))
        self.entropy.index_add_(0, part, torch.xlogy(p, p).sum(1))
        self.probability.index_add_(0, part, p)

    def value(self) -> tuple[float, float]:
        """(mean, standard deviation) over the parts that have images."""
        there = self.count > 0
        count, mean = self.count[there], self.probability[there] / self.count[there, None]
        marginal = torch.xlogy(mean, mean).sum(1)
        scores = (self.entropy[there] / count - marginal).exp()
        return scores.mean().item(), scores.std(correction=0).item()
