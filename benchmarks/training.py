"""Teaches the demo's network the phantom in seconds, so that its picture shows organs and not noise.

The promise of the toolkit does not depend on it: any weights are partitioned exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def fit(network: UNet, steps: int = 30, progress: Callable[[int], None] = lambda step: None) -> None:
    """Fit the head to the fixed features of the seeded network, then all weights for some steps of Adam.

    Args:
        network: one input channel in Hounsfield units, one class per `CLASS_NAMES`; changed in place.
        steps: 0 leaves the network as it is.
        progress: called with the number of finished steps.
    """
    if steps == 0:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _fit_head(network)
        network.train()
        _descend(network, steps, progress)
        network.eval()


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


def _descend(network: UNet, steps: int, progress: Callable[[int], None]) -> None:
    weights = torch.tensor(_CLASS_WEIGHTS)
    optimiser = torch.optim.Adam(network.parameters(), _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, _LEARNING_RATE, total_steps=max(steps, 2), pct_start=0.2
    )
    for step in range(steps):
        first = 10 + _STEP_BATCH * step
        volumes, classes = _batch(_STEP_SHAPE, range(first, first + _STEP_BATCH))
        optimiser.zero_grad()
        functional.cross_entropy(network(volumes), classes, weight=weights).backward()
        optimiser.step()
        schedule.step()
        progress(step + 1)
