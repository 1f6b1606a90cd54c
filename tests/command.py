"""The command as its users run it, in this process or in one of its own, and small models to run it on."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from partitioner.cli import main

ROOT = Path(__file__).resolve().parent.parent
Array = np.ndarray


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


def run_here(*arguments: str | Path) -> Result:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:  # how argparse ends
            code = int(end.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def works(*arguments: str | Path) -> str:
    """What a command prints that must succeed."""
    found = run_here(*arguments)
    assert found.code == 0, found.err
    assert found.err == ""
    return found.out


def refused(*arguments: str | Path, code: int = 2) -> str:
    """The message of a command that must fail: clear lines and nothing else."""
    found = run_here(*arguments)
    assert found.code == code, (found.code, found.out, found.err)
    check_message(found.err)
    assert found.out == ""
    return found.err


def check_message(err: str) -> None:
    """Every line begins with the command's name, and none is a traceback or our own fault."""
    lines = err.splitlines()
    assert lines
    assert all(line.startswith("partition: ") and len(line) < 700 for line in lines), err
    assert "Traceback" not in err and "internal error" not in err, err


def environment(**more: str) -> dict[str, str]:
    """Of processes that the tests start: one thread, the code of this checkout, no other group."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    path = os.pathsep.join(filter(None, (more.pop("PYTHONPATH", ""), str(ROOT))))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def start(*arguments: str | Path, cwd: Path | None = None, module: str = "partitioner.cli",
          **variables: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", module, *map(str, arguments)], env=environment(**variables), cwd=cwd,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Result:
    """What a process says, when it has ended."""
    out, err = process.communicate(timeout=timeout)
    return Result(process.returncode, out, err)


def run_apart(*arguments: str | Path, **more: Any) -> Result:
    """The command in a process of its own, to its end."""
    return finish(start(*arguments, **more))


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What a condition yields as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
    return found


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def all_gone(processes: Sequence[psutil.Process], seconds: float = 30) -> bool:
    """Whether processes end in time."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def count_tensors_only(patch: pytest.MonkeyPatch) -> None:
    """Let budgets count tensors only: programs and kernels take more than all activations of small networks."""
    for what in ("runtime.forecast.KERNEL", "runtime.forecast.STEP", "partitioner.budget.SEARCHED",
                 "partitioner.budget.Searched.nbytes"):
        patch.setattr(what, 0)


# --- models ------------------------------------------------------------------------------------------

FLOAT = TensorProto.FLOAT


def value(name: str, shape: Sequence[int | str] | None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    """An input or output."""
    return helper.make_tensor_value_info(name, dtype, shape)


def model(nodes: Sequence[onnx.NodeProto], inputs: Sequence[onnx.ValueInfoProto],
          outputs: Sequence[onnx.ValueInfoProto], weights: Mapping[str, Array] | None = None, opset: int = 18,
          ir_version: int = 9, domains: Sequence[str] = ()) -> onnx.ModelProto:
    """A model of standard operators, and of other domains in version 1."""
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


SHAPE = (1, 2, 7, 11, 5)


def kernel(out: int = 3, channels: int = 2, axes: int = 3, dtype: Any = np.float32) -> Array:
    """Weights of a convolution of 3 cells per axis."""
    random = np.random.default_rng(out + 10 * channels)
    return random.standard_normal((out, channels, *[3] * axes)).astype(dtype)


def convolution(shape: Sequence[int | str] = SHAPE, dtype: int = FLOAT) -> onnx.ModelProto:
    """One padded convolution, `x` to `y`."""
    axes, channels = len(shape) - 2, int(shape[1])
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1] * 2 * axes)
    out = [shape[0], 3, *shape[2:]]
    return model([node], [value("x", shape, dtype)], [value("y", out, dtype)],
                 {"w": kernel(3, channels, axes, numpy_type)})


def volume(shape: Sequence[int] = SHAPE, seed: int = 0, dtype: Any = np.float32) -> Array:
    """Random data."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def many_convolutions(shape: tuple[int, ...], count: int = 240) -> onnx.ModelProto:
    """Convolutions one after the other: a run of some seconds."""
    random = np.random.default_rng(0)
    weights = {f"w{i}": random.standard_normal((2, 2, 3, 3, 3)).astype(np.float32) / 6 for i in range(count)}
    nodes = [onnx.helper.make_node("Conv", ["x" if i == 0 else f"c{i}", f"w{i}"], [f"c{i + 1}"], pads=[1] * 6)
             for i in range(count)]
    return model(nodes, [value("x", shape)], [value(f"c{count}", shape)], weights)
