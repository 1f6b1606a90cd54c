"""Ranks over shared memory: the bits of lock-step, the bytes foretold, and what happens when one dies."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

import partitioner as pt
from runtime.group import check_backend
from tests.models import NETWORKS
from tests.test_deaths import all_gone, workers

SHAPES = ((1, 1, 13, 17, 11), (1, 1, 29, 31, 18))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> pt.Plan:
    path = tmp_path_factory.mktemp("shared") / "model.onnx"
    NETWORKS["unet3d-stride-instance"].export(path, dynamic=True, exporter="dynamo")
    return pt.partition(path, mesh="depth=2,height=2", shapes={"volume": SHAPES[0]})


def test_the_bits_of_lockstep_and_the_bytes_foretold(plan: pt.Plan) -> None:
    """Also after a change to larger extents, for which blocks are too small."""
    with plan.session("shm", threads=1) as session:
        for shape in (*SHAPES, SHAPES[0]):
            x = {"volume": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
            same = plan if shape == SHAPES[0] else plan.with_shapes({"volume": shape})
            assert np.array_equal(session.run(x)["logits"], same.run(x)["logits"])
            assert session.last_run is not None
            assert [r.sent_bytes for r in session.last_run.ranks] == same.cost.sent.reshape(-1).tolist()
            assert [r.messages for r in session.last_run.ranks] == same.cost.messages.reshape(-1).tolist()


def test_a_long_folder_for_temporary_files(plan: pt.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a socket has room for some hundred characters only."""
    folder = tmp_path / ("of_a_job_" * 12)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    x = {"volume": np.zeros(SHAPES[0], np.float32)}
    with plan.session("shm", threads=1) as session:
        assert np.array_equal(session.run(x)["logits"], plan.run(x)["logits"])


def test_a_rank_that_dies(plan: pt.Plan) -> None:
    session = plan.session("shm", threads=1)
    processes = workers(session)
    x = {"volume": np.zeros(SHAPES[0], np.float32)}
    session.run(x)
    processes[1].kill()
    begin = time.monotonic()
    with pytest.raises(pt.ExecutionError, match=r"\Arank 1 was killed by SIGKILL[^\n]*\Z"):
        session.run(x)
    assert time.monotonic() - begin < 30
    assert all_gone(processes, 5)


def test_only_memory_of_the_host(plan: pt.Plan) -> None:
    with pytest.raises(pt.PartitionError, match="backend shm moves the memory of this host, not of device 'cuda'"):
        check_backend("shm", "cuda", 4)
    with pytest.raises(pt.PartitionError, match="for backend gloo, not shm"):
        plan.session("shm", link=pt.Link(1e-3, 1e9))
