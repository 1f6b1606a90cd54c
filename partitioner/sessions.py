"""A plan made ready for several runs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from partitioner.errors import PartitionError
from partitioner.guards import Arrays, check_inputs, check_link, check_outputs, is_tensor

if TYPE_CHECKING:
    from partitioner.api import Plan
    from partitioner.profile import Link
    from runtime.session import Runner, RunReport

Backend = Literal["lockstep", "gloo", "nccl", "shm"]
Progress = Callable[[int, int, str], None]

KEPT_PLANS = 4
"""How many plans a session keeps for shapes that it has seen."""


class Session:
    """A plan ready to run, with its processes and weights; keeps the last few plans for other shapes.

    Attributes:
        last_run: what the last run measured (seconds, peak memory, bytes and messages per rank), or None.
    """

    def __init__(self, plan: Plan, backend: Backend, device: str, threads: int | None,
                 link: Link | None = None) -> None:
        if backend not in get_args(Backend):
            raise PartitionError(f"backend '{backend}' is unknown; use {', '.join(get_args(Backend))}")
        if threads is not None and (not isinstance(threads, int) or threads < 1):  # pyright: ignore
            raise PartitionError(f"threads={threads!r}: give at least 1, or None to share out the cores")
        if link is not None:
            check_link(link)
        self.plan = plan
        self._first = plan
        self._lock = threading.Lock()
        self._options = (backend, str(device), threads)
        self._link = link
        self._plans: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], Plan] = OrderedDict()
        self._plans[_key(plan.input_shapes)] = plan
        self._runner: Runner | None = self._start(plan)
        self.last_run: RunReport | None = None

    def run(self, inputs: Arrays, progress: Progress | None = None, out: Arrays | None = None) -> dict[str, Any]:
        """Run once; inputs of another shape are planned for first.

        Args:
            inputs: numpy arrays or torch tensors (on any device) per input name.
            progress: called with (steps done, steps in all, step's name).
            out: arrays that outputs are written to, by name, of their shape and type: memory that is there already, or
                a file that is mapped; those without one come in new memory.

        Returns:
            whole outputs per name, numpy or torch (on its device) as the first input is.

        Raises:
            PartitionError: for a missing or unknown input, a wrong shape or type, an array that has no room.
            ExecutionError: when a rank dies.
        """
        with self._lock:  # one run at a time, whichever threads ask for it
            plan, room = self._plan_for(inputs), {} if out is None else out
            check_outputs(plan.model, room, inputs)
            self._use(plan)
            assert self._runner is not None
            results = self._runner.run_arrays(inputs, progress, room)
            self.last_run = self._runner.report
        first = next(iter(inputs.values()))
        if is_tensor(first):
            return {name: room[name] if name in room else tensor.to(first.device) for name, tensor in results.items()}
        from runtime.feeds import to_numpy

        return {name: room[name] if name in room else to_numpy(tensor) for name, tensor in results.items()}

    def close(self) -> None:
        """End the processes and give back memory; harmless when repeated."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _start(self, plan: Plan) -> Runner:
        from runtime.session import make_runner

        backend, device, threads = self._options
        return make_runner(plan.model, backend, device, threads, self._link)

    def _plan_for(self, inputs: Arrays) -> Plan:
        if self._runner is None:
            raise PartitionError("this session is closed; open another with plan.session()")
        check_inputs(self.plan.model, inputs)
        shapes = {name: tuple(int(n) for n in array.shape) for name, array in inputs.items()}
        key = _key(shapes)
        if key not in self._plans:
            is_first = key == _key(self._first.input_shapes)
            self._plans[key] = self._first if is_first else self._first.with_shapes(shapes)
        self._plans.move_to_end(key)
        while len(self._plans) > KEPT_PLANS:
            self._plans.popitem(last=False)
        return self._plans[key]

    def _use(self, plan: Plan) -> None:
        if plan is self.plan:
            return
        assert self._runner is not None
        self._runner = self._runner.switch(plan.model)
        self.plan = plan


def _key(shapes: Mapping[str, Sequence[int]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted((name, tuple(shape)) for name, shape in shapes.items()))
