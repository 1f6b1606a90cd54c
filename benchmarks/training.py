"""Teaches the demo's network the phantom in seconds, so that its picture shows organs and not noise.

The promise of the toolkit does not depend on it: any weights are partitioned exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import UNet
from benchmarks.phantom import CLASS_NAMES, phantom

_CLASSES = len(CLASS_NAMES)
_CLASS_WEIGHTS = (0.5, 1.0, 1.0, 3.0, 1.5)
_HEAD_SHAPES = ((61, 80, 72), (43, 56, 51))
_SAMPLES_PER_CLASS = 8000
# Two small volumes a step: with one, torch leaves oneDNN for kernels many times slower.
_STEP_SHAPE = (37, 48, 43)
_STEP_BATCH = 2
_LEARNING_RATE = 3e-3
_WARM_UP = 0.2


def fit(network: UNet, steps: int = 30, limit_seconds: float = 30) -> int:
    """Fit the head to the fixed features of the seeded network, then all weights for some steps of Adam.

    Args:
        network: one input channel in Hounsfield units, one class per `CLASS_NAMES`; changed in place.
        steps: 0 leaves the network as it is.
        limit_seconds: a slow or busy machine takes fewer steps; the learning rate ends low all the same.

    Returns:
        the number of steps taken; the same weights follow from the same number.
    """
    if steps == 0:
        return 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _fit_head(network)
        network.train()
        taken = _descend(network, steps, limit_seconds)
        network.eval()
    return taken


def _batch(shape: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Volumes (batch, 1, *shape) and classes (batch, *shape)."""
    scans = [phantom(shape, seed) for seed in seeds]
    volumes = torch.stack([torch.from_numpy(scan.hounsfield).float()[None] for scan in scans])
    return volumes, torch.stack([torch.from_numpy(scan.classes).long() for scan in scans])


def _fit_head(network: UNet) -> None:
    """Logistic regression on a balanced sample of the features that go into the head."""
    features, labels = _sample_features(network)
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    standard = (features - mean) / deviation
    linear = nn.Linear(features.shape[1], _CLASSES)
    optimiser = torch.optim.LBFGS(linear.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        penalty = 1e-5 * linear.weight.square().sum()
        loss = functional.cross_entropy(linear(standard), labels) + penalty
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        weight = linear.weight / deviation
        bias = linear.bias - weight @ mean
        network.head.load_state_dict({"weight": weight[:, :, None, None, None], "bias": bias})


def _sample_features(network: UNet) -> tuple[Tensor, Tensor]:
    """Features (samples, channels) and their classes (samples,), as many of each class as there are."""
    caught: list[Tensor] = []
    hook = network.head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    found: list[tuple[Tensor, Tensor]] = []
    for seed, shape in enumerate(_HEAD_SHAPES, start=1):
        volumes, classes = _batch(shape, [seed])
        with torch.no_grad():
            network(volumes)
        flat, labels = caught.pop()[0].flatten(1).T, classes.flatten()
        for kind in range(_CLASSES):
            places = torch.nonzero(labels == kind)[:, 0]
            chosen = places[torch.randperm(len(places))[: _SAMPLES_PER_CLASS // len(_HEAD_SHAPES)]]
            found.append((flat[chosen], labels[chosen]))
    hook.remove()
    return torch.cat([f for f, _ in found]), torch.cat([y for _, y in found])


def _descend(network: UNet, steps: int, limit_seconds: float) -> int:
    weights = torch.tensor(_CLASS_WEIGHTS)
    optimiser = torch.optim.Adam(network.parameters())
    started = time.monotonic()
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - started) / limit_seconds)
        if progress >= 1:
            return step
        optimiser.param_groups[0]["lr"] = _learning_rate(progress)
        first = 10 + _STEP_BATCH * step
        volumes, classes = _batch(_STEP_SHAPE, range(first, first + _STEP_BATCH))
        optimiser.zero_grad()
        functional.cross_entropy(network(volumes), classes, weight=weights).backward()
        optimiser.step()
    return steps


def _learning_rate(progress: float) -> float:
    """Up for the first fifth, then down to nothing along a cosine; progress runs from 0 to 1."""
    if progress < _WARM_UP:
        return _LEARNING_RATE * (0.1 + 0.9 * progress / _WARM_UP)
    return _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))
