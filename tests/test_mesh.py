"""Meshes: ranks and coordinates, and what a user may write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.errors import PartitionError
from partitioner.mesh import AXIS_NAMES, Mesh, spatial_names

meshes = st.dictionaries(st.sampled_from(AXIS_NAMES), st.integers(1, 5)).map(Mesh.parse)


@given(meshes)
def test_ranks_and_coordinates_are_one_to_one(mesh: Mesh) -> None:
    seen = [tuple(mesh.coordinates(rank).items()) for rank in mesh]
    assert len(set(seen)) == mesh.size
    assert [mesh.rank(mesh.coordinates(rank)) for rank in mesh] == list(range(mesh.size))
    assert seen == sorted(seen, key=lambda items: [value for _, value in items]), "the last axis varies fastest"


@given(meshes)
def test_text_round_trip(mesh: Mesh) -> None:
    assert Mesh.parse(str(mesh)) == mesh


def test_forms() -> None:
    assert Mesh.parse("height=2, depth=3") == Mesh.parse({"depth": 3, "height": 2}) == Mesh.parse("3x2")
    assert Mesh.parse("2x3", spatial_rank=2) == Mesh.parse("height=2,width=3")
    assert Mesh.parse("4", spatial_rank=1) == Mesh.parse("width=4")
    assert Mesh.parse(None).size == Mesh.parse("single").size == Mesh.parse("").size == 1
    assert Mesh.parse("depth=2").count("width") == 1
    assert spatial_names(2) == ("height", "width")


@pytest.mark.parametrize(
    ("given", "message"),
    [("depht=2", "'depht' is unknown"), ("depth=0", "integer from 1"), ("depth=-1", "integer from 1"),
     ({"depth": 2.5}, "integer from 1"), ({"depth": True}, "integer from 1"), ("depth=2,depth=3", "twice"),
     ("two", "not understood"), ("depth=2,height", "not understood"), ("2x", "not understood"),
     ("2x2x2x2", "4 axes but the volume has 3"), ({"channel": 2}, "'channel' is unknown")])
def test_mistakes_are_named(given: object, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        Mesh.parse(given)  # type: ignore[arg-type]
