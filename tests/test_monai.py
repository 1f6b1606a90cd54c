"""`pt.monai.WholeVolumeInferer`: the module's own result, whatever it returns, and kept until its weights change."""

from __future__ import annotations

import copy
import gc
import importlib.util
import subprocess
import sys
import weakref
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import partitioner as pt
from benchmarks.__main__ import main as benchmarks
from benchmarks.seams import window_starts
from partitioner import dialect
from partitioner.budget import RESERVE
from runtime.monitor import anonymous_memory
from tests.models import UNetConfig

needs_monai = pytest.mark.skipif(importlib.util.find_spec("monai") is None, reason="needs monai")
Pair = namedtuple("Pair", "logits features")


class Heads(nn.Module):
    """Returns what `give` makes of its logits and features."""

    def __init__(self, give: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.ReLU())
        self.head = nn.Conv3d(4, 3, 1)
        self.give = give

    def forward(self, x: torch.Tensor) -> Any:
        features = self.body(x)
        return self.give(self.head(features), features)


class Guided(nn.Module):
    """Takes tensors beside the volume."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, *, shift: torch.Tensor | None = None) -> torch.Tensor:
        y = self.conv(x) * mask
        return y if shift is None else y + shift


def small() -> nn.Module:
    return Heads(lambda logits, features: logits).eval()


def volume(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


def check_near(found: Any, expected: torch.Tensor, limit: float = 1e-5) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype and not found.requires_grad
    assert (found - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize(("config", "shape"), [
    (UNetConfig(levels=3, base=4), (1, 1, 37, 29, 31)), (UNetConfig(levels=2, base=4), (2, 1, 16, 19, 23)),
    (UNetConfig(levels=3, base=4, norm="batch", down="maxpool", up="trilinear"), (1, 1, 24, 21, 17)),
    (UNetConfig(dims=2, levels=3, base=4), (2, 1, 45, 38)), (UNetConfig(dims=1, levels=3, base=4), (1, 1, 97)),
], ids=str)
def test_the_result_is_that_of_the_module_run_whole(config: UNetConfig, shape: tuple[int, ...]) -> None:
    network, x = config.build(), volume(*shape)
    with pt.monai.WholeVolumeInferer() as inferer, torch.no_grad():
        check_near(inferer(x, network), network(x))


RETURNS: dict[str, Callable[[Any, Any], Any]] = {
    "a tuple": lambda y, f: (y, f),
    "a list": lambda y, f: [f, y],
    "a dict": lambda y, f: {"seg": y, "aux": f},
    "a named tuple": lambda y, f: Pair(y, f),
    "one nested": lambda y, f: {"out": [y, (f,)], "note": "x"},
    "with none": lambda y, f: (y, None, 7),
    "one twice": lambda y, f: (y, y, f),
    "a tuple of one": lambda y, f: (y,),
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_comes_back_is_built_as_the_network_does(name: str) -> None:
    network, x = Heads(RETURNS[name]).eval(), volume(1, 1, 9, 8, 7)
    with pt.monai.WholeVolumeInferer() as inferer, torch.no_grad():
        found, expected = inferer(x, network), network(x)
    (leaves, structure), (wanted, same) = (torch.utils._pytree.tree_flatten(v) for v in (found, expected))
    assert structure == same
    for leaf, want in zip(leaves, wanted, strict=True):
        if isinstance(want, torch.Tensor):
            check_near(leaf, want)
        else:
            assert leaf == want


def test_tensors_beside_the_volume() -> None:
    network, x, mask, shift = Guided().eval(), volume(2, 1, 13, 9), volume(2, 1, 13, 9) > 0, volume(2, 3, 1, 1)
    with pt.monai.WholeVolumeInferer(mesh="height=2") as inferer, torch.no_grad():
        check_near(inferer(x, network, mask), network(x, mask))
        check_near(inferer(x, network, mask, shift=shift), network(x, mask, shift=shift))
        check_near(inferer(x, network, shift=shift, mask=mask), network(x, mask, shift=shift))


def test_branches_on_extents_are_those_of_the_extents() -> None:
    """A graph that was exported for other extents would take the other branch."""
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[2] > 8 else x + 1

    network = Branches()
    with pt.monai.WholeVolumeInferer() as inferer:
        for extent in (10, 7, 9, 10):
            x = volume(1, 1, extent, 5)
            check_near(inferer(x, network), network(x))


# --- kept from call to call --------------------------------------------------------------------------


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda m: m.head.weight.mul_(2),
    "through data": lambda m: m.head.weight.data.neg_(),
    "a state dict": lambda m: m.load_state_dict({k: 3 * v for k, v in m.state_dict().items()}),
    "another parameter": lambda m: setattr(m.head, "bias", nn.Parameter(torch.ones(3))),
    "another layer": lambda m: m.body.__setitem__(2, nn.Sigmoid()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_give_new_results(name: str) -> None:
    network, x = small(), volume(1, 1, 9, 8, 7)
    with pt.monai.WholeVolumeInferer() as inferer, torch.no_grad():
        before, session = inferer(x, network), inferer.session_of(network)
        assert torch.equal(inferer(x, network), before) and inferer.session_of(network) is session
        CHANGES[name](network)
        check_near(inferer(x, network), network(x))
        assert not torch.equal(inferer(x, network), before)
        assert inferer.session_of(network) is not session


def test_the_last_extents_stay_ready() -> None:
    network = small()
    with pt.monai.WholeVolumeInferer(keep=2) as inferer:
        sessions = []
        for extent in (5, 6, 5, 7, 5, 6):
            inferer(volume(1, 1, extent, 4, 4), network)
            sessions.append(inferer.session_of(network))
    five, six, again, _, kept, anew = sessions
    assert five is again is kept and anew is not six


def test_a_module_in_training_mode_is_put_back() -> None:
    network, x = small(), volume(1, 1, 9, 8, 7)
    network.train()
    network.body.eval()
    with pt.monai.WholeVolumeInferer() as inferer:
        inferer(x, network)
    assert network.training and network.head.training and not network.body.training


def test_a_module_that_is_gone_leaves_nothing() -> None:
    network, inferer = small(), pt.monai.WholeVolumeInferer()
    inferer(volume(1, 1, 9, 8, 7), network)
    session, gone = inferer.session_of(network), weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None and not inferer._modules
    with pytest.raises(pt.PartitionError, match="closed"):
        session.run({name: volume(*shape) for name, shape in session.plan.input_shapes.items()})


def test_closed_and_copied_inferers_begin_anew() -> None:
    network, x, inferer = small(), volume(1, 1, 9, 8, 7), pt.monai.WholeVolumeInferer(mesh="depth=2")
    before = inferer(x, network)
    inferer.close()
    inferer.close()
    other = copy.deepcopy(inferer)
    for again in (inferer, other):
        assert torch.equal(again(x, network), before)
        again.close()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_modes_do_not_reach_the_result(mode: Callable[[], Any]) -> None:
    network, x = small(), volume(1, 1, 9, 8, 7)
    with torch.no_grad():
        expected = network(x)
    with pt.monai.WholeVolumeInferer() as inferer, mode():
        found = inferer(x.clone().requires_grad_(not torch.is_inference_mode_enabled()), network)
    check_near(found, expected)


# --- options -----------------------------------------------------------------------------------------


def test_the_budget_is_kept() -> None:
    network, x = UNetConfig(levels=3, base=16).build(), volume(1, 1, 96, 64, 64)
    with pt.monai.WholeVolumeInferer() as inferer:
        expected, session = inferer(x, network), inferer.session_of(network)
        assert session is not None
        peak, arrays = session.plan.cost.peak_together, x.nbytes + expected.nbytes
        whole = dialect.get_schedule(session.plan.model) is None
    memory = anonymous_memory() + RESERVE + arrays + (3 * peak // 4 if whole else 3 * peak // 2)
    with pt.monai.WholeVolumeInferer(memory=memory) as inferer:
        check_near(inferer(x, network), expected)
        session = inferer.session_of(network)
        assert session is not None and dialect.get_schedule(session.plan.model) is not None


def test_a_budget_that_is_too_small_is_refused() -> None:
    with (pt.monai.WholeVolumeInferer(memory="1MiB") as inferer,
          pytest.raises(pt.PartitionError, match=r"memory 1\.00 MiB: this model at these extents needs at least")):
        inferer(volume(1, 1, 9, 8, 7), small())


def test_output_ops_are_in_the_graph() -> None:
    network, x = Heads(lambda y, f: {"seg": y, "aux": f}).eval(), volume(1, 1, 9, 8, 7)
    with pt.monai.WholeVolumeInferer(output_ops=["seg=argmax"]) as inferer, torch.no_grad():
        found, expected = inferer(x, network), network(x)
    assert torch.equal(found["seg"].long(), expected["seg"].argmax(1, keepdim=True))
    check_near(found["aux"], expected["aux"])


def test_processes_of_their_own() -> None:
    network, x = small(), volume(1, 1, 9, 8, 7)
    with pt.monai.WholeVolumeInferer(mesh="depth=2", backend="gloo") as inferer, torch.no_grad():
        check_near(inferer(x, network), network(x))


@needs_monai
def test_meta_data_stay_with_the_result() -> None:
    from monai.data import MetaTensor
    from monai.inferers import Inferer, SlidingWindowInferer

    network, affine = small(), torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    x = MetaTensor(volume(1, 1, 9, 8, 7), affine=affine, meta={"patient": "p1"})
    with pt.monai.WholeVolumeInferer() as inferer, torch.no_grad():
        assert isinstance(inferer, Inferer)
        found, like = inferer(x, network), SlidingWindowInferer((9, 8, 7))(x, network)
        (pair,) = {type(part) for part in inferer(x, Heads(lambda y, f: (y, f)))}
        check_near(found.as_tensor(), network(x.as_tensor()))
    assert type(found) is type(like) is pair is MetaTensor
    assert found.meta.keys() == like.meta.keys() and found.meta["patient"] == "p1"
    assert torch.equal(found.affine, like.affine)


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "says"), [
    (lambda i: i(volume(1, 1, 5, 5), lambda x: x), "network: <lambda> is a function, which cannot be exported; give"),
    (lambda i: i(volume(5, 5), small()), r"inputs: has 2 axes; give \(batch, channel"),
    (lambda i: i(np.zeros((1, 1, 5, 5)), small()), "inputs: is a ndarray, give a torch tensor"),
    (lambda i: i(volume(1, 1, 5, 5), Guided(), 3), "argument 1: is a int, which the exported graph cannot take; give"),
    (lambda i: i(volume(1, 1, 5, 5), Guided(), mask=None), "mask: is a NoneType, which the exported graph cannot"),
    (lambda i: i(volume(1, 1, 5, 5).to("meta"), small()), "inputs: is a tensor of no data"),
    (lambda i: i(volume(1, 1, 5, 5).double(), Guided(), volume(1, 1, 5, 5)), "torch.onnx cannot export Guided: "),
    (lambda i: i(volume(1, 1, 5, 5, 5), nn.LazyConv3d(2, 3)), "parameters without data; load its weights"),
    (lambda i: i(volume(1, 1, 5, 5, 5), Heads(lambda y, f: 3)), "Heads returns no tensor"),
    (lambda i: i(volume(1, 1, 5, 5, 5), nn.Sequential(nn.RNN(5, 5))), "torch.onnx cannot export|RNN"),
    (lambda i: i(volume(1, 1, 5, 5, 5), torch.jit.trace(small(), volume(1, 1, 5, 5, 5))), "is TorchScript"),
], ids=range(11))
def test_what_is_refused(call: Callable[[Any], Any], says: str) -> None:
    with pt.monai.WholeVolumeInferer() as inferer, pytest.raises(pt.PartitionError, match=says) as error:
        call(inferer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "says"), [
    ({"memory": "much"}, "no amount of memory"), ({"host_memory": "1GiB"}, "give memory too"),
    ({"keep": 0}, "at least 1"),
])
def test_options_that_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(pt.PartitionError, match=says):
        pt.monai.WholeVolumeInferer(**options)


# --- the benchmark -----------------------------------------------------------------------------------


@needs_monai
def test_seams_are_measured_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("seams", "--size", "32", "--window", "16", "--base", "4", "--train-steps", "0")
    assert benchmarks([*words, "--output", str(tmp_path / "seams.png")]) == 0
    printed = capsys.readouterr().out
    assert "27 windows of 16³" in printed and "0.000%" in printed
    assert (tmp_path / "seams.png").read_bytes().startswith(b"\x89PNG")


@needs_monai
@pytest.mark.parametrize(("size", "window", "overlap"), [(96, 48, 0.25), (37, 16, 0.5), (16, 16, 0.25), (30, 7, 0.9)])
def test_windows_are_those_of_monai(size: int, window: int, overlap: float) -> None:
    from monai.inferers import SlidingWindowInferer

    def network(part: torch.Tensor) -> torch.Tensor:
        seen.append(int(part[0, 0, 0]))
        return part

    seen: list[int] = []
    SlidingWindowInferer((window,), 1, overlap)(torch.arange(size, dtype=torch.float32)[None, None], network)
    assert window_starts(size, window, overlap) == seen


def test_seams_without_monai_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert benchmarks(["seams"]) == 2
    assert capsys.readouterr().err == "error: seams needs MONAI: pip install 'partitioner[monai]'\n"


def test_it_loads_when_it_is_asked_for_and_without_monai() -> None:
    code = ("import sys, partitioner as pt\nassert not {'torch', 'monai'} & set(sys.modules)\n"
            "sys.modules['monai'] = None\nassert pt.monai.WholeVolumeInferer.__mro__[1:] == (object,)\n")
    subprocess.run([sys.executable, "-c", code], check=True)
