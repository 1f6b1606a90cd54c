"""Networks drawn by Hypothesis: sharded runs, full of NaN where nobody wrote, against the unsharded ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from partitioner import dialect
from partitioner.loader import load_model
from partitioner.mesh import Mesh
from partitioner.ops import registered
from passes.base import Pass
from passes.canonicalize import Canonicalize
from passes.expand import expand
from passes.keep_apart import KeepApart
from passes.pipeline import Pipeline
from passes.split_reductions import SplitReductions
from tests.builder import Style, wide
from tests.drawn import DRAWN, IN_FLOAT32, WITHOUT_RULE
from tests.oracle import as_double, close, compile_plan, error, ort_bits, pipeline, run_lockstep, run_ort
from tests.strategies import Network, networks

MANY = int(os.environ.get("PARTITIONER_GRAPHS", "3000"))
"""How many graphs the slow suite draws, per test."""

quick = settings(deadline=None, derandomize=True, database=None, print_blob=False,
                 suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
thorough = settings(quick, derandomize=False, max_examples=MANY)


def check_float64(network: Network) -> None:
    """Equal to the reference to 1e-12; bytes and messages as foretold (run_lockstep counts them)."""
    note(str(network))
    inputs = {name: wide(array) for name, array in network.inputs.items()}
    plan = compile_plan(as_double(network.model), network.mesh, network.cuts, storage=network.storage)
    found = run_lockstep(load_model(ir.to_proto(plan)), inputs).outputs  # from what the file holds, nothing else
    for name, expected in network.expected.items():
        assert close(found[name], expected, 1e-12), f"{name}: error {error(found[name], expected)}"


def check_float32(network: Network) -> None:
    """No worse than three times onnxruntime's error; its bits are untouched by layout and communication."""
    note(str(network))
    runtime = run_ort(network.model, network.inputs)
    bits: list[dict[str, bytes]] = []

    def observe(index: int, item: Pass, plan: ir.Model) -> None:
        found = ort_bits(plan, network.inputs)
        arithmetic = isinstance(item, Canonicalize | KeepApart | SplitReductions)
        assert arithmetic or found == bits[-1], f"{item.name} changed the result"
        bits.append(found)

    plan = compile_plan(network.model, network.mesh, network.cuts, storage=network.storage, observe=[observe])
    found = run_lockstep(plan, network.inputs).outputs
    for name, expected in network.expected.items():
        limit = 3 * error(runtime[name], expected)
        assert found[name].dtype == runtime[name].dtype
        assert close(found[name], expected, limit), f"{name}: error {error(found[name], expected)}, limit {limit}"


    if network.expanded:
        form = run_ort(ir.to_proto(expand(plan)), network.inputs)
        for name, expected in network.expected.items():
            limit = max(3 * error(runtime[name], expected), 1e-5)
            assert close(form[name], expected, limit), f"{name}, expanded: error {error(form[name], expected)}"


def check_integers(network: Network) -> None:
    """Small whole numbers: the very bits of onnxruntime."""
    note(str(network))
    runtime = run_ort(network.model, network.inputs)
    plan = compile_plan(network.model, network.mesh, network.cuts, storage=network.storage)
    found = run_lockstep(plan, network.inputs).outputs
    for name, expected in network.expected.items():
        assert np.array_equal(runtime[name], expected), f"{name}: the reference is wrong"
        assert np.array_equal(found[name], runtime[name]), name


def test_every_operator_is_drawn() -> None:
    """An operator without a drawer is in no network here: add one to tests/drawn_*.py."""
    known = {f"{domain}:{name}".removeprefix(":") for domain, name, _ in registered() if domain != dialect.DOMAIN}
    assert sorted(known - DRAWN) == []
    assert sorted(DRAWN - known - set(WITHOUT_RULE)) == []


def check_operator(name: str, style: Style, count: int, check: Callable[[Network], None]) -> None:
    """Networks with one operator, which most of them must have."""
    having: list[bool] = []

    @settings(quick, max_examples=count)
    @given(networks(replace(style, focus=name)))
    def check_all(network: Network) -> None:
        having.append(any(f"{n.domain}:{n.op_type}".removeprefix(":") == name for n in network.model.graph.node))
        check(network)

    check_all()
    assert any(having), f"no network of {len(having)} has {name}"


@pytest.mark.parametrize("name", sorted(DRAWN - IN_FLOAT32))
def test_every_operator_in_float64(name: str) -> None:
    check_operator(name, Style(steps=4), 3, check_float64)


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_every_operator_in_float32(name: str) -> None:
    check_operator(name, Style(runtime=True, steps=3), 2, check_float32)


@settings(quick, max_examples=120)
@given(networks(Style()))
def test_graphs_in_float64(network: Network) -> None:
    check_float64(network)


@settings(quick, max_examples=60)
@given(networks(Style(runtime=True, steps=5)))
def test_graphs_in_float32(network: Network) -> None:
    check_float32(network)


@settings(quick, max_examples=60)
@given(networks(Style(integers=True, runtime=True, steps=5)))
def test_graphs_of_integers(network: Network) -> None:
    check_integers(network)


@settings(quick, max_examples=60)
@given(networks(Style(convolutional=True)))
def test_nothing_is_gathered_in_a_fully_convolutional_network(network: Network) -> None:
    check_float64(network)
    plan = compile_plan(network.model, network.mesh, network.cuts)
    assert [n.name for n in plan.graph if n.op_type == dialect.RESHARD] == []


@settings(quick, max_examples=80)
@given(networks(Style()), st.randoms(use_true_random=False))
def test_graphs_with_pinned_layers(network: Network, random: Random) -> None:
    """Any layers, computed by all ranks along any axes of the mesh."""
    mesh, model = Mesh.parse(network.mesh), load_model(as_double(network.model))
    names = [str(n.name) for n in Pipeline((Canonicalize({}), KeepApart(mesh))).run(model.clone()).graph]
    axes = list(mesh.names)
    pinned = {name: tuple(axes[: random.randint(1, len(axes))] if random.random() < 0.4 else [random.choice(axes)])
              for name in random.sample(names, random.randint(1, len(names))) if axes}
    note(f"{network} {pinned}")
    plan = pipeline(mesh, network.cuts, storage=network.storage, pinned=pinned).run(model)
    found = run_lockstep(plan, {name: wide(array) for name, array in network.inputs.items()}).outputs
    for name, expected in network.expected.items():
        assert close(found[name], expected, 1e-12), f"{name}: error {error(found[name], expected)}"


@pytest.mark.slow
@pytest.mark.timeout(0)
@thorough
@given(networks(Style(steps=10)))
def test_many_graphs_in_float64(network: Network) -> None:
    check_float64(network)


@pytest.mark.slow
@pytest.mark.timeout(0)
@thorough
@given(networks(Style(runtime=True)))
def test_many_graphs_in_float32(network: Network) -> None:
    check_float32(network)


@pytest.mark.slow
@pytest.mark.timeout(0)
@thorough
@given(networks(Style(integers=True, runtime=True)))
def test_many_graphs_of_integers(network: Network) -> None:
    check_integers(network)
