"""Depth-first execution: slab after slab equals all at once, and nothing is computed twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from partitioner.loader import load_model
from tests.architectures import ARCHITECTURES, AXES, INPUT_NAME, export
from tests.builder import Style, wide
from tests.drawn import DRAWN, IN_FLOAT32
from tests.oracle import as_double, close, compile_plan, error, run_lockstep
from tests.strategies import Network, extents_of, networks
from tests.test_graphs import quick, thorough


def check_rolled(network: Network, data: st.DataObject) -> None:
    """Along any axis that the mesh does not split, in slabs of any thickness, full of NaN where nobody wrote."""
    note(str(network))
    split = {item.partition("=")[0] for item in network.mesh.split(",")}
    free = sorted(set(extents_of(network.model)) - split)
    if not free:
        return
    name = data.draw(st.sampled_from(free))
    thickness = data.draw(st.integers(1, 4))
    plan = compile_plan(as_double(network.model), network.mesh, network.cuts, storage=network.storage,
                        rolled=name, thickness=thickness)
    inputs = {name: wide(array) for name, array in network.inputs.items()}
    found = run_lockstep(load_model(ir.to_proto(plan)), inputs).outputs
    for name, expected in network.expected.items():
        assert close(found[name], expected, 1e-12), f"{name}: error {error(found[name], expected)}"


@pytest.mark.parametrize("name", sorted(DRAWN - IN_FLOAT32))
def test_every_operator_slab_by_slab(name: str) -> None:
    @settings(quick, max_examples=2)
    @given(networks(Style(steps=4, focus=name)), st.data())
    def check_all(network: Network, data: st.DataObject) -> None:
        check_rolled(network, data)

    check_all()


@settings(quick, max_examples=150)
@given(networks(Style(steps=6)), st.data())
def test_networks_slab_by_slab(network: Network, data: st.DataObject) -> None:
    check_rolled(network, data)


@settings(quick, max_examples=100)
@given(networks(Style(steps=8, convolutional=True)), st.data())
def test_convolutional_networks_slab_by_slab(network: Network, data: st.DataObject) -> None:
    check_rolled(network, data)


@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if name.startswith("torch/") and a.dims])
def test_architectures_slab_by_slab(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    export(architecture, tmp_path / "m.onnx", "torchscript", False)
    model = onnx.load(tmp_path / "m.onnx")
    inputs = {INPUT_NAME: np.random.default_rng(5).standard_normal(architecture.shape, dtype=np.float32)}
    whole = run_lockstep(compile_plan(model, None), inputs).outputs
    for thickness in (3, 8):
        plan = compile_plan(model, None, rolled=AXES[3 - architecture.dims], thickness=thickness)
        found = run_lockstep(plan, inputs).outputs
        for output, expected in whole.items():
            assert close(found[output], expected, 5e-6), f"{output}: error {error(found[output], expected)}"


@pytest.mark.slow
@settings(thorough)
@given(networks(Style(steps=7)), st.data())
def test_many_networks_slab_by_slab(network: Network, data: st.DataObject) -> None:
    check_rolled(network, data)
