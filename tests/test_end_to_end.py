"""From files to files through the command, over processes and agents, and what happens when things go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

import partitioner as pt
from partitioner.cli import main
from tests.models import NETWORKS

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (1, 1, 13, 17, 11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its plan for four ranks, and a volume."""
    found = tmp_path_factory.mktemp("run")
    NETWORKS["unet3d-stride-instance"].export(found / "model.onnx", exporter="dynamo")
    pt.partition(found / "model.onnx", mesh="depth=2,height=2").save(found / "plan.onnx")
    np.save(found / "x.npy", np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32))
    return found


def command(*arguments: str | Path, **kept: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **kept}
    return subprocess.run([sys.executable, "-m", "partitioner.cli", *map(str, arguments)], env=env, text=True,
                          capture_output=True, timeout=240, check=False)


def fails(capsys: pytest.CaptureFixture[str], arguments: Sequence[str | Path], code: int = 2) -> str:
    """The one message of a command that ends with `code`."""
    assert main([str(a) for a in arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("partition: ") for line in lines), lines
    return "\n".join(lines)


# --- the same bits every way -------------------------------------------------------------------------


def test_processes_give_the_bits_of_lockstep_and_the_bytes_foretold(folder: Path) -> None:
    plan = pt.load(folder / "plan.onnx")
    x = {"volume": np.load(folder / "x.npy")}
    expected = plan.run(x)["logits"]
    with plan.session(backend="gloo") as session:
        for _ in range(2):
            assert np.array_equal(session.run(x)["logits"], expected)
        assert session.last_run is not None
        ranks = session.last_run.ranks
    assert [r.sent_bytes for r in ranks] == plan.cost.sent.ravel().tolist()
    assert [r.messages for r in ranks] == plan.cost.messages.ravel().tolist()


def test_run_from_file_to_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = pt.load(folder / "plan.onnx").run({"volume": np.load(folder / "x.npy")})["logits"]
    assert main(["run", str(folder / "plan.onnx"), "--input", str(folder / "x.npy"), "--output",
                 str(tmp_path / "y.npy"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [r["sent_bytes"] for r in figures["ranks"]] == figures["predicted_sent_bytes"]
    done = command("run", folder / "plan.onnx", "--input", folder / "x.npy", "--output", tmp_path / "z.npy",
                   "--backend", "gloo")
    assert done.returncode == 0, done.stderr
    for name in ("y.npy", "z.npy"):
        assert np.array_equal(np.load(tmp_path / name), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["y.npy", "z.npy"]


@pytest.mark.slow
def test_two_agents_on_loopback(folder: Path, tmp_path: Path) -> None:
    expected = pt.load(folder / "plan.onnx").run({"volume": np.load(folder / "x.npy")})["logits"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend",
             "c10d", "--rdzv-endpoint", "127.0.0.1:29571", "--rdzv-id", "t", "-m", "partitioner.cli", "run",
             str(folder / "plan.onnx"), "--input", str(folder / "x.npy"), "--output", str(tmp_path / "y.npy")]
    agents = [subprocess.Popen(agent, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [a.communicate(timeout=240)[1] for a in agents]
    assert [a.returncode for a in agents] == [0, 0], errors
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)


@pytest.mark.parametrize("name", ["y.nii.gz", "y.nii", "y.npz"])
def test_file_formats(folder: Path, tmp_path: Path, name: str) -> None:
    assert main(["run", str(folder / "plan.onnx"), "--input", f"volume={folder / 'x.npy'}", "--output",
                 f"logits={tmp_path / name}"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_verify_plan_and_compile(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder / "plan.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert main(["verify", str(folder / "model.onnx"), "--mesh", "width=3", "--tolerance", "1e-12"]) == 1
    capsys.readouterr()
    assert main(["plan", str(folder / "model.onnx"), "--mesh", "2x2x1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == 4 and found["gathered"] == []
    assert main(["compile", str(folder / "model.onnx"), "--mesh", "2x1x1", "-o", str(tmp_path / "d.onnx"), "--emit",
                 "devices", "--dump-dir", str(tmp_path / "dump")]) == 0
    onnx.checker.check_model(str(tmp_path / "d.onnx"), full_check=True)
    assert sorted(p.name for p in (tmp_path / "dump").iterdir())[0] == "00-canonicalize.onnx"
    assert main(["compile", str(folder / "model.onnx"), "--mesh", "2x1x1", "--emit", "text"]) == 0
    assert "HaloExchange" in capsys.readouterr().out


# --- what goes wrong ---------------------------------------------------------------------------------


def test_files_that_are_no_models(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / "model.onnx").read_bytes()
    for content in (b"", b"\x89PNG\r\n\x1a\n", b"hello", bytes(range(256)) * 8, whole[: len(whole) // 2], whole[:100]):
        (tmp_path / "bad.onnx").write_bytes(content)
        assert "bad.onnx" in fails(capsys, ["plan", tmp_path / "bad.onnx", "--mesh", "depth=2"])
    assert "no such file" in fails(capsys, ["plan", tmp_path / "none.onnx"])
    assert "folder" in fails(capsys, ["plan", tmp_path])


def test_external_weights(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert main(["plan", str(tmp_path / "m.onnx"), "--mesh", "depth=2"]) == 0
    capsys.readouterr()
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(data[:-8])
    assert "w.bin" in fails(capsys, ["plan", tmp_path / "m.onnx", "--mesh", "depth=2"])
    (tmp_path / "w.bin").unlink()
    assert "missing" in fails(capsys, ["plan", tmp_path / "m.onnx", "--mesh", "depth=2"])
    (tmp_path / "sub").mkdir()
    moved = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for tensor in moved.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../w.bin" if entry.key == "location" else entry.value
    (tmp_path / "w.bin").write_bytes(data)
    (tmp_path / "sub" / "m.onnx").write_bytes(moved.SerializeToString())
    assert "outside" in fails(capsys, ["plan", tmp_path / "sub" / "m.onnx", "--mesh", "depth=2"])


@pytest.mark.parametrize(("mesh", "says"), [
    ("depth=40", "depth=13"), ("time=2", "unknown"), ("depth=0", "from 1"), ("depth=two", "not understood"),
    ("2x2x2x2", "3 spatial"), ("batch=2", "batch=1"),
])
def test_impossible_meshes(folder: Path, capsys: pytest.CaptureFixture[str], mesh: str, says: str) -> None:
    assert says in fails(capsys, ["plan", folder / "model.onnx", "--mesh", mesh])


def test_wrong_inputs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = folder / "plan.onnx"
    y = tmp_path / "y.npy"
    np.save(tmp_path / "wrong.npy", np.zeros((1, 1, 5, 5, 5), np.float32))
    np.save(tmp_path / "ints.npy", np.zeros(SHAPE, np.complex64))
    assert "extents" in fails(capsys, ["run", plan, "--input", tmp_path / "wrong.npy", "--output", y])
    fails(capsys, ["run", plan, "--input", tmp_path / "ints.npy", "--output", y])
    assert "unknown" in fails(capsys, ["run", plan, "--input", f"scan={folder / 'x.npy'}", "--output", y])
    assert "folder" in fails(capsys, ["run", plan, "--input", folder / "x.npy", "--output", tmp_path / "no" / "y.npy"])
    assert not y.exists()


def test_damaged_plans(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = onnx.load(folder / "plan.onnx")
    broken = onnx.ModelProto()
    broken.CopyFrom(plan)
    entry = next(o for o in broken.opset_import if o.domain == "partitioner")
    entry.version = 99
    onnx.save(broken, tmp_path / "p.onnx")
    assert "format 99" in fails(capsys, ["plan", tmp_path / "p.onnx"])
    broken.CopyFrom(plan)
    for value in broken.graph.value_info:
        for prop in value.metadata_props:
            prop.value = prop.value.replace("depth(0|7|13)", "depth(0|9|13)")
    onnx.save(broken, tmp_path / "p.onnx")
    assert "damaged" in fails(capsys, ["plan", tmp_path / "p.onnx"])
    whole = (folder / "plan.onnx").read_bytes()
    (tmp_path / "p.onnx").write_bytes(whole[: len(whole) - 1000])
    assert "p.onnx" in fails(capsys, ["plan", tmp_path / "p.onnx"])


def test_a_killed_rank_ends_the_run(folder: Path, tmp_path: Path) -> None:
    plan = pt.load(folder / "plan.onnx")
    x = {"volume": np.load(folder / "x.npy")}
    session = plan.session(backend="gloo")
    pool = session._runner.pool  # type: ignore[union-attr]
    victim = pool._processes[2]
    pids = [p.pid for p in pool._processes]

    def kill(done: int, count: int, name: str) -> None:
        if victim.poll() is None:
            os.kill(victim.pid, signal.SIGKILL)

    start = time.monotonic()
    with pytest.raises(pt.ExecutionError, match=r"rank 2 was killed by SIGKILL"):
        for _ in range(50):
            session.run(x, progress=kill)
    assert time.monotonic() - start < 30
    session.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
