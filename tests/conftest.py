"""What several files of tests begin with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.command import convolution, volume


@pytest.fixture
def conv(tmp_path: Path) -> Path:
    """A convolution of fixed extents, and a volume for it."""
    onnx.save(convolution(), tmp_path / "conv.onnx")
    np.save(tmp_path / "x.npy", volume())
    return tmp_path / "conv.onnx"
