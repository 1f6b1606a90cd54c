"""What processes of tests are forked from: torch, its exporter and our packages, read and used once.

Nothing here may start a thread or enter a process group.
"""

from __future__ import annotations

import torch

import partitioner as pt
from runtime.training.build import build_module
from tests import training

network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.BatchNorm2d(1), torch.nn.ReLU())
plan = pt.partition(network, torch.zeros(2, 1, 4, 4), mesh="height=2", train=True)

__all__ = ["build_module", "plan", "training"]
