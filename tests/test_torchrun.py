"""Runs that torchrun has started: on one host, on two agents, with ranks that disagree and ranks that die."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

import partitioner as pt
from runtime.group import Place, first_host, place_from_environment
from tests.command import Result, all_gone, environment, family, finish, many_convolutions, volume, wait_for
from tests.models import NETWORKS
from tests.test_wire import HOOK

NETWORK = NETWORKS["unet3d-stride-instance"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its plan for two ranks, a volume and what lock-step makes of it."""
    found = tmp_path_factory.mktemp("torchrun")
    NETWORK.export(found / "m.onnx")
    plan = pt.partition(found / "m.onnx", mesh="depth=2")
    plan.save(found / "p.onnx")
    np.save(found / "x.npy", volume(NETWORK.shape))
    np.save(found / "expected.npy", plan.run({"volume": volume(NETWORK.shape)})["logits"])
    return found


def launch(folder: Path, options: Sequence[str], arguments: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "partitioner.cli", *arguments]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=environment(GLOO_SOCKET_IFNAME="lo", **variables), start_new_session=True)


def one_host(ranks: int) -> list[str]:
    return ["--standalone", "--nproc-per-node", str(ranks)]


def two_hosts(ranks: int) -> list[str]:
    """Two agents that meet on the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["--nnodes", "2", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-id", "test",
            "--rdzv-endpoint", f"127.0.0.1:{port}"]


def ours(found: Result) -> list[str]:
    """Our own lines among those of torchrun; none of our processes prints a traceback."""
    assert "partitioner/cli.py" not in found.err and "internal error" not in found.err, found.err
    return [line for line in found.err.splitlines() if line.startswith("partition: ")]


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


RUN = ["--input", "x.npy", "--output", "y.npy"]


# --- what must work ----------------------------------------------------------------------------------


def test_one_agent_gives_the_bits_of_lockstep(folder: Path) -> None:
    found = finish(launch(folder, one_host(2), ["run", "p.onnx", *RUN]))
    assert found.code == 0, found.err
    assert ours(found) == [] and found.out.startswith("wrote y.npy in ") and len(found.out.splitlines()) == 1
    assert np.load(folder / "y.npy").tobytes() == np.load(folder / "expected.npy").tobytes()
    (folder / "y.npy").unlink()


@pytest.mark.slow
def test_two_agents_give_the_bits_of_lockstep(folder: Path, tmp_path: Path) -> None:
    """And their messages, counted at torch.distributed, are those that the plan foretells."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    (tmp_path / "log").mkdir()
    plan = pt.partition(folder / "m.onnx", mesh="depth=2,height=2")
    expected = plan.run({"volume": volume(NETWORK.shape)})["logits"]
    options = two_hosts(2)
    agents = [launch(folder, options, ["run", "m.onnx", "--mesh", "2x2x1", *RUN], PYTHONPATH=str(tmp_path),
                     WIRE_LOG=str(tmp_path / "log")) for _ in range(2)]
    found = [finish(agent, 240) for agent in agents]
    assert [f.code for f in found] == [0, 0], "".join(f.err for f in found)
    assert sorted(f.out != "" for f in found) == [False, True]  # only rank 0 speaks
    assert np.load(folder / "y.npy").tobytes() == expected.tobytes()
    (folder / "y.npy").unlink()
    sent = [0] * 4
    for path in (tmp_path / "log").iterdir():
        for line in path.read_text().splitlines():
            call, rank, _, nbytes = eval(line)
            sent[rank] += nbytes if call == "isend" else 0
    assert sent == plan.cost.sent.ravel().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("output", ["y.nii.gz", "y.npz"])
def test_other_files(folder: Path, output: str) -> None:
    before = files(folder)
    found = finish(launch(folder, one_host(2), ["run", "p.onnx", "--input", "x.npy", "--output", output, "--json"]))
    assert found.code == 0 and '"seconds"' in found.out, found.err
    assert files(folder) == sorted([*before, output])
    (folder / output).unlink()


@pytest.mark.slow
def test_one_rank_is_a_group_too(folder: Path) -> None:
    found = finish(launch(folder, one_host(1), ["run", "m.onnx", *RUN]))
    assert found.code == 0, found.err
    (folder / "y.npy").unlink()


# --- what all ranks must agree on --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "says"), [
    (["run", "p.onnx", *RUN, "--mesh", "depth=3"], "is a plan for the mesh depth=2, not depth=3"),
    (["run", "m.onnx", *RUN, "--mesh", "depth=3"], "the mesh depth=3 has 3 ranks but 2 processes were started; make"),
    (["run", "m.onnx", *RUN], "the mesh single has 1 ranks but 2 processes were started; make them equal"),
    (["run", "none.onnx", *RUN], "none.onnx: no such file"),
    (["run", "p.onnx", "--input", "none.npy", "--output", "y.npy"], "none.npy: no such file"),
    (["run", "p.onnx", "--input", "x.npy", "--output", "none/y.npy"], "the folder"),
    (["run", "p.onnx", *RUN, "--device", "tpu"], "device 'tpu' is unknown"),
    (["run", "p.onnx", *RUN, "--backend", "lockstep"], "lockstep runs all shards in one process"),
    (["verify", "p.onnx"], "verify starts its own ranks"),
])
def test_mistakes_are_told_once(folder: Path, arguments: list[str], says: str) -> None:
    before = files(folder)
    found = finish(launch(folder, one_host(2), arguments))
    (line,) = ours(found)
    assert found.code == 1 and says in line  # torchrun's own code; ours is in its summary
    assert "exitcode  : 2" in found.err
    assert files(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(("missing", "says"), [
    ("m.onnx", "rank 1: m.onnx: no such file"), ("x.npy", "rank 1: x.npy: no such file"),
    (None, "rank 1 has another model"),
])
def test_hosts_that_differ(folder: Path, tmp_path: Path, missing: str | None, says: str) -> None:
    """What is wrong on one host only ends the ranks on all of them, in one line and without waiting."""
    options = two_hosts(1)
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
        for name in ("m.onnx", "x.npy"):
            (place / name).write_bytes((folder / name).read_bytes())
    # which agent becomes rank 1 is not ours to say: take the file from the rank itself
    arguments = ["run", "m.onnx", "--mesh", "depth=2", *RUN]
    hook = ("import os\n"
            "if os.environ.get('RANK') == '1' and 'LOCAL_RANK' in os.environ:\n" + (
                f"    os.path.exists({missing!r}) and os.unlink({missing!r})\n" if missing else
                "    import onnx\n"
                "    m = onnx.load('m.onnx')\n"
                "    m.graph.initializer[0].raw_data = m.graph.initializer[1].raw_data[:4] + "
                "m.graph.initializer[0].raw_data[4:]\n"
                "    onnx.save(m, 'm.onnx')\n"))
    (tmp_path / "sitecustomize.py").write_text(hook)
    begin = time.monotonic()
    agents = [launch(place, options, arguments, PYTHONPATH=str(tmp_path)) for place in places]
    found = [finish(agent, 120) for agent in agents]
    assert all(f.code == 1 for f in found)
    lines = [line for f in found for line in ours(f)]
    assert len(lines) == 1 and says in lines[0]
    assert time.monotonic() - begin < 90
    assert not any(name.startswith("y.npy") for place in places for name in files(place))


# --- deaths ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some seconds, and an older output."""
    found = tmp_path_factory.mktemp("long")
    shape = (1, 2, 160, 161, 40)
    onnx.save(many_convolutions(shape), found / "m.onnx")
    np.save(found / "x.npy", volume(shape))
    return found


def rank_of(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("RANK") if "LOCAL_RANK" in process.environ() else None
    return None


@pytest.mark.parametrize(("victim", "number"), [
    ("1", signal.SIGKILL),
    pytest.param("0", signal.SIGKILL, marks=pytest.mark.slow),
    pytest.param("2", signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param("agent", signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param("agent", signal.SIGINT, marks=pytest.mark.slow),
])
def test_deaths_in_the_middle(long_run: Path, victim: str, number: int) -> None:
    """All ranks end within 30 s, the exit code is 1, the older output stays and nothing is left behind."""
    (long_run / "y.npy").write_bytes(b"old")
    process = launch(long_run, one_host(3), ["run", "m.onnx", "--mesh", "depth=3", *RUN, "--overwrite"])
    try:
        wait_for(lambda: list(long_run.glob("y.npy.*.part")) or process.poll() is not None)
        time.sleep(0.3)
        everyone = family(process)
        ranks = {rank_of(p): p for p in everyone if rank_of(p) is not None}
        assert sorted(ranks) == ["0", "1", "2"]  # type: ignore[type-var]
        begin = time.monotonic()
        (everyone[0] if victim == "agent" else ranks[victim]).send_signal(number)
        found = finish(process, 60)
        assert all_gone(everyone, 30) and time.monotonic() - begin < 30
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert found.code == 1 and found.out == ""
    assert all("failed (" in line or "no output was written" in line for line in ours(found))
    assert files(long_run) == ["m.onnx", "x.npy", "y.npy"]
    assert (long_run / "y.npy").read_bytes() == b"old"


# --- where we stand ----------------------------------------------------------------------------------


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    assert place_from_environment() is None
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
             "SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": "gpu[03-06],login"}
    for name, text in slurm.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("MASTER_PORT", "")
    monkeypatch.delenv("MASTER_PORT")
    assert place_from_environment() == Place(5, 8, 1)
    assert os.environ["MASTER_ADDR"] == "gpu03" and 20000 <= int(os.environ["MASTER_PORT"]) < 40000
    for name, text in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, text)
    assert place_from_environment() == Place(2, 4, 0)


@pytest.mark.parametrize(("nodes", "first"), [
    ("gpu[03-07,9],x", "gpu03"), ("node1", "node1"), ("a,b", "a"), ("rack-2-n[001,005]", "rack-2-n001"),
    ("", "127.0.0.1"),
])
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.slow
def test_slurm_variables_start_a_group(folder: Path) -> None:
    """Two processes as srun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        slurm = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0",
                 "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": port,
                 "MASTER_ADDR": "127.0.0.1"}
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "partitioner.cli", "run", "p.onnx", *RUN], cwd=folder, text=True,
            env={**environment(GLOO_SOCKET_IFNAME="lo"), **slurm}, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    found = [finish(p) for p in processes]
    assert [f.code for f in found] == [0, 0], found
    assert np.load(folder / "y.npy").tobytes() == np.load(folder / "expected.npy").tobytes()
    (folder / "y.npy").unlink()
