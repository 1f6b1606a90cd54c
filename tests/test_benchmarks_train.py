"""`python -m benchmarks train`: curves that do not depend on the mesh, runs that go on where they ended, options."""

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
import torch

import partitioner as pt
from benchmarks import liver
from benchmarks.__main__ import main
from benchmarks.curves import Row, draw, read_table, running_mean, write_table
from benchmarks.liver_network import LiverConfig
from benchmarks.peers_training import opened_training
from benchmarks.phantom import phantom
from benchmarks.suite import example_input
from benchmarks.suites import find_suite
from benchmarks.train import Reporter, schedule
from tests.command import all_gone, environment, family, finish, wait_for

SMALL = ["--size", "12x11x13", "--filters", "2", "--depth", "2", "--steps", "5", "--volumes", "3", "--held-out", "3",
         "--evaluate-every", "2", "--threads", "1", "--dtype", "float64", "--dropout", "0.3"]


def started(folder: Path, *arguments: str, small: Sequence[str] = SMALL) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks", "train", "--output", str(folder), *small, *arguments]
    return subprocess.Popen(command, env=environment(GLOO_SOCKET_IFNAME="lo"), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def here(folder: Path, *arguments: str) -> list[Row]:
    assert main(["train", "--output", str(folder), *SMALL, *arguments]) == 0
    return read_table(folder / "curves.csv")


def numbers(rows: Sequence[Row]) -> list[tuple[float, ...]]:
    return [(row.step, row.learning_rate, row.loss, row.liver or -1, row.lesion or -1) for row in rows]


def assert_alike(found: Sequence[Row], expected: Sequence[Row], rtol: float = 1e-8) -> None:
    assert len(found) == len(expected)
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=rtol)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """A run of one shard, and its curve."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, here(folder, "--checkpoint-every", "2")


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".part", ".old", ".tmp"))]


# --- curves and files ---------------------------------------------------------------------------------


def test_files(alone: tuple[Path, list[Row]]) -> None:
    folder, rows = alone
    assert sorted(os.listdir(folder)) == ["checkpoint", "curves.csv", "curves.png", "trained.onnx",
                                          "volumes-12x11x13"]
    assert [row.step for row in rows] == [1, 2, 3, 4, 5]
    assert [row.liver is not None for row in rows] == [False, True, False, True, True]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    onnx.checker.check_model(onnx.load(folder / "trained.onnx"))
    trained = pt.partition(folder / "trained.onnx", mesh="depth=2", shapes={"volume": (2, 1, 12, 11, 13)})
    found = trained.run({"volume": np.zeros((2, 1, 12, 11, 13))})
    assert next(iter(found.values())).shape == (2, 3, 12, 11, 13)


@pytest.mark.parametrize("mesh", ["depth=3,width=2", pytest.param("batch=2", marks=pytest.mark.slow)])
def test_the_curve_does_not_depend_on_the_mesh(mesh: str, alone: tuple[Path, list[Row]], tmp_path: Path) -> None:
    assert_alike(here(tmp_path, "--mesh", mesh, "--backend", "lockstep"), alone[1])


@pytest.mark.slow
def test_nor_on_processes(alone: tuple[Path, list[Row]], tmp_path: Path) -> None:
    found = finish(started(tmp_path, "--mesh", "height=2", "--json"))
    assert found.code == 0, found.err
    figures = json.loads(found.out)
    assert_alike(read_table(tmp_path / "curves.csv"), alone[1])
    assert (figures["processes"], figures["mesh"]) == (2, "height=2")
    assert figures["loss"] == pytest.approx(alone[1][-1].loss, rel=1e-8)
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_nor_on_processes_beside_copies(tmp_path: Path) -> None:
    """Two copies of the network, each alone or on two shards."""
    for name, mesh in (("a", []), ("b", ["--mesh", "width=2"])):
        found = finish(started(tmp_path / name, "--replicas", "2", *mesh))
        assert found.code == 0, found.err
    assert_alike(read_table(tmp_path / "b/curves.csv"), read_table(tmp_path / "a/curves.csv"))


@pytest.mark.slow
def test_under_torchrun(alone: tuple[Path, list[Row]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "benchmarks", "train", "--output", str(tmp_path), *SMALL, "--mesh", "depth=2"]
    found = finish(subprocess.Popen(command, env=environment(GLOO_SOCKET_IFNAME="lo"), text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    assert found.code == 0, found.err
    assert_alike(read_table(tmp_path / "curves.csv"), alone[1])


@pytest.mark.slow
def test_options_of_precision(tmp_path: Path) -> None:
    """bfloat16 near float32, and checkpointed activations equal to kept ones."""
    single = [a if a != "float64" else "float32" for a in SMALL]
    curves: list[list[Row]] = []
    for number, more in enumerate(([], ["--amp", "bfloat16"], ["--checkpoint-activations"])):
        assert main(["train", "--output", str(tmp_path / str(number)), *single, *more]) == 0
        curves.append(read_table(tmp_path / str(number) / "curves.csv"))
    losses = np.array([[row.loss for row in rows] for rows in curves])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


# --- runs that end early ------------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process were gone."""


def die_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    show = Reporter.show

    def dying(self: Reporter, row: Row) -> None:
        show(self, row)
        if row.step == step:
            raise Killed

    monkeypatch.setattr(Reporter, "show", dying)


@pytest.mark.parametrize(("step", "mesh"), [(3, "depth=2"), pytest.param(4, "width=3", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_with_the_same_numbers(step: int, mesh: str, alone: tuple[Path, list[Row]],
                                                    tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last checkpoint, in the middle of an epoch, on another mesh."""
    with monkeypatch.context() as patched, pytest.raises(Killed):
        die_at(step, patched)
        here(tmp_path, "--checkpoint-every", "2")
    rows = here(tmp_path, "--resume", "--mesh", mesh, "--backend", "lockstep")
    assert_alike(rows, alone[1])
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_interrupted_in_good_order(tmp_path: Path) -> None:
    """Ctrl-C ends after the step, with a checkpoint from which another mesh goes on."""
    many = [a if a != "5" else "100000" for a in SMALL]
    process = started(tmp_path, "--mesh", "depth=2", small=many)
    wait_for((tmp_path / "curves.csv").exists)
    processes = family(process)
    process.send_signal(signal.SIGINT)
    found = finish(process)
    assert found.code == 130, (found.out, found.err)
    assert "interrupted after step" in found.out and found.err == ""
    assert all_gone(processes) and leftovers(tmp_path) == []
    rows = read_table(tmp_path / "curves.csv")
    folder = tmp_path / "checkpoint"
    assert json.loads((folder / "about.json").read_text())["extra"]["step"] == len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[], ["--mesh", "depth=2"]])
@pytest.mark.parametrize("seconds", [1.0, 2.5, 4.0])
def test_interrupted_while_setting_up(seconds: float, mesh: list[str], tmp_path: Path) -> None:
    process = started(tmp_path, *mesh, small=[a if a != "5" else "100000" for a in SMALL])
    time.sleep(seconds)
    processes = family(process)
    process.send_signal(signal.SIGINT)
    found = finish(process)
    assert found.code == 130 and found.err in ("", "interrupted\n"), (found.out, found.err)
    assert all_gone(processes) and leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    many = [a if a != "5" else "100000" for a in SMALL]
    process = started(tmp_path, "--mesh", "depth=2", "--checkpoint-every", "2", small=many)
    wait_for((tmp_path / "checkpoint/about.json").exists)
    ranks = [p for p in family(process)[1:] if "train" in p.cmdline()]
    ranks[1].kill()
    found = finish(process)
    assert found.code == 1 and "killed by SIGKILL" in found.err and "Traceback" not in found.err, found.err
    assert all_gone(ranks)
    assert finish(started(tmp_path, "--resume", "--steps", "300")).code == 0


@pytest.mark.slow
def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    many = [a if a != "5" else "100000" for a in SMALL]
    process = started(tmp_path, "--mesh", "depth=2", small=many)
    wait_for((tmp_path / "curves.csv").exists)
    processes = family(process)
    process.kill()
    process.communicate()
    assert len(processes) >= 3 and all_gone(processes)


# --- the measured step --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["ours", pytest.param("ours on 2 ranks", marks=pytest.mark.slow)])
def test_measured_sides_have_the_gradients_of_torch(side: str) -> None:
    """Over two steps, so that statistics and optimiser are part of it."""
    case = find_suite("training-smoke").cases[0]
    volume = example_input(case)
    found: list[list[np.ndarray]] = []
    for chosen in (s for s in case.sides if s.name in ("torch eager", side)):
        with opened_training(chosen, case, 1) as runner:
            found.append([runner.run(volume) for _ in range(2)])
    for expected, own in zip(*found, strict=True):
        assert expected.shape == own.shape and np.abs(own - expected).max() < 1e-3 * np.abs(expected).max()


def test_training_suites_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    found = capsys.readouterr().out
    assert "training:" in found and "1 rank; 2 ranks; 4 ranks; 8 ranks" in found


# --- mistakes -----------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", *arguments]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.startswith("error: ") and len(found.err.splitlines()) == 1, found
    return found.err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--size", "big"], "--size 'big' is not understood; write 48 or 48x64x64"),
    (["--size", "8"], "--size 8x8x8: with --depth 4 each extent must lie between 16 and 4096"),
    (["--mesh", "deep=2"], "--mesh: mesh axis 'deep' is unknown; use batch, depth, height, width"),
    (["--steps", "0"], "--steps 0: at least 1 is needed"),
    (["--held-out", "0"], "--held-out 0: at least 1 is needed"),
    (["--dropout", "1"], "--dropout 1: give a share from 0 to below 1"),
    (["--learning-rate", "nan"], "--learning-rate nan: give a number above 0"),
    (["--backend", "lockstep", "--replicas", "2"], "--backend lockstep computes one copy of the network"),
    (["--backend", "lockstep", "--processes"], "--backend lockstep is one process"),
    (["--amp", "bfloat16", "--dtype", "float64"], "--amp bfloat16 goes with --dtype float32"),
    (["--resume"], "--resume: there is no checkpoint in "),
    ([*SMALL, "--mesh", "depth=99", "--backend", "lockstep"], "axis 2 of input 'volume' has only 12 cells"),
    pytest.param([*SMALL, "--device", "cuda:77"], "device 'cuda:77'", marks=pytest.mark.slow),
])
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "--output", str(tmp_path), *arguments)


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "choose another folder" in refused(capsys, "--output", str(tmp_path / "file" / "x"))


@pytest.mark.parametrize(("arguments", "more"), [
    (["--seed", "3"], "was made with --seed 0, not 3"),
    pytest.param([], "is at step 5 already; give more --steps", marks=pytest.mark.slow),
    pytest.param(["--filters", "4"], "another model", marks=pytest.mark.slow),
])
def test_a_checkpoint_of_another_run(arguments: list[str], more: str, alone: tuple[Path, list[Row]],
                                     capsys: pytest.CaptureFixture[str]) -> None:
    again = ["--output", str(alone[0]), *SMALL, "--resume"]
    assert more in refused(capsys, *again, *arguments)


# --- parts --------------------------------------------------------------------------------------------


def test_the_network_is_the_paper_s() -> None:
    """Two convolutions per level down and up, norms and activations after each, dropouts after all but the first."""
    network = LiverConfig().build()
    kinds = [type(part).__name__ for part in network.modules()]
    assert kinds.count("Conv3d") == 2 * 4 + 2 * 3 + 1 and kinds.count("ConvTranspose3d") == 3
    assert kinds.count("BatchNorm3d") == kinds.count("LeakyReLU") == 14
    assert kinds.count("Dropout") == 14 - 1 + 3
    small = LiverConfig(2, 3).build().eval()
    assert small(torch.zeros(1, 1, 9, 11, 14)).shape == (1, 3, 9, 11, 14)


def test_weights_follow_from_the_seed() -> None:
    a, b, c = (LiverConfig(2, 2, seed=seed).build().state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])


def test_volumes() -> None:
    volume, labels = liver.make((40, 44, 48), "train", 3)
    again, _ = liver.make((40, 44, 48), "train", 3)
    other, _ = liver.make((40, 44, 48), "held-out", 3)
    assert volume.dtype == np.float32 and labels.dtype == np.uint8 and volume.shape == labels.shape == (40, 44, 48)
    assert np.array_equal(volume, again) and not np.array_equal(volume, other)
    assert volume.min() >= 0 and volume.max() <= 1
    assert sorted(np.unique(labels)) == [0, 1, 2]
    assert volume[labels == 1].mean() > volume[labels == 2].mean() + 0.05


def test_the_phantom_of_the_demo_is_as_it_was() -> None:
    assert int(phantom((31, 32, 33), 5).hounsfield.astype(np.int64).sum()) == int(
        phantom((31, 32, 33), 5, variety=0).hounsfield.astype(np.int64).sum())
    assert not np.array_equal(phantom((31, 32, 33), 5).classes, phantom((31, 32, 33), 5, variety=0.1).classes)


def test_volumes_that_are_there_stay(tmp_path: Path) -> None:
    liver.write(tmp_path, "train", 2, (8, 8, 8))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    liver.write(tmp_path, "train", 3, (8, 8, 8))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 4 and len(after) == 6
    assert all(after[path] == time for path, time in before.items())


def test_schedule() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert max(rates) == 1 and rates.index(1) in (9, 10) and rates[0] == 0.1 and 0 < rates[-1] < 0.01
    assert schedule(0, 1) == 1


def test_table_and_picture(tmp_path: Path) -> None:
    rows = [Row(1, 0.5, 1e-3, 1 / 3), Row(2, 1.0, 2e-3, 0.25, 0.5, None), Row(3, 1.5, 2e-3, 0.2, 0.75, 0.1)]
    write_table(rows, tmp_path / "t.csv")
    assert read_table(tmp_path / "t.csv") == rows
    draw(rows, "a title", tmp_path / "p.png")
    draw(rows[:1], "no Dice yet", tmp_path / "q.png")
    assert sorted(os.listdir(tmp_path)) == ["p.png", "q.png", "t.csv"]
    assert running_mean([4.0]) == [4.0] and running_mean([0.0] * 20 + [22.0])[-1] == 2.0


def test_help_states_the_paper_s_options() -> None:
    found = subprocess.run([sys.executable, "-m", "benchmarks", "train", "--help"], env=environment(), text=True,
                           capture_output=True, check=True)
    assert "--filters 32 --size 512" in found.stdout
