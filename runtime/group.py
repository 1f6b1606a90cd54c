"""The process group of a distributed run: joining it, agreeing on errors before work starts, leaving it."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Generator, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from partitioner.errors import AgreedError, ExecutionError, PartitionError
from runtime.census import not_finite
from runtime.feeds import Portion, Tally, fill_from_slab, slab_parts
from runtime.volumes import Source

PATIENCE = timedelta(minutes=5)
"""How long a rank waits for the others to join."""

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for a peer that computes; a peer that died is noticed at once."""


GONE = "the exchange with"
"""How the message begins when a peer is gone: a consequence, never the first cause."""


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank, how many there are, its number on this host."""

    rank: int
    size: int
    local_rank: int


def place_from_environment() -> Place | None:
    """Our place when torchrun or Slurm started us; None when nobody did.

    Under Slurm the rendezvous address is the first host of the job unless MASTER_ADDR says otherwise.

    Raises:
        PartitionError: when the numbers in the environment are none.
    """
    env = os.environ
    try:
        return _place(env)
    except ValueError as error:
        raise PartitionError(f"the environment names no place among the ranks ({error}); start the ranks with torchrun "
                             "or srun, or unset RANK and SLURM_PROCID") from None


def _place(env: MutableMapping[str, str]) -> Place | None:
    if "RANK" in env and "WORLD_SIZE" in env and "MASTER_ADDR" in env:
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", env["RANK"])))
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in env:
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
        return Place(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", "0")))
    return None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[03-07,9],x` -> `gpu03`."""
    found = re.match(r"([^\[,]+)(?:\[([0-9]+))?", nodes)
    return "127.0.0.1" if found is None else found.group(1) + (found.group(2) or "")


def join(place: Place, backend: str, init_method: str = "env://") -> None:
    """Enter the process group; NCCL runs carry a gloo group for small messages in host memory.

    The wait for the others goes on in a thread beside, so that a signal ends it.

    Raises:
        ExecutionError: when the other ranks cannot be reached, or do not come in time.
    """
    kind = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            store, rank, size = next(rendezvous(init_method, place.rank, place.size, timeout=PATIENCE))
            store.set_timeout(PATIENCE)
            dist.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
    if not failures:
        return
    error = failures[0]
    if isinstance(error, RuntimeError | ValueError):
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ExecutionError(f"rank {place.rank}: cannot reach the other ranks ({reason[:160]}); "
                             "check MASTER_ADDR, MASTER_PORT and the network, and the other ranks' messages") from None
    raise error


def leave() -> None:
    """Leave the process group if we are in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def peers(ranks: Sequence[int] | None = None) -> Generator[None]:
    """A block that talks to other ranks (None: to all of them).

    Raises:
        ExecutionError: when one of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        reason = re.sub(r"^\[\S*\]\s*|\. This is typically.*$", "", reason)
        whom = "all ranks" if ranks is None else f"ranks {list(ranks)}"
        raise ExecutionError(f"rank {dist.get_rank()}: {GONE} {whom} failed ({reason[:160]}); "
                             "see the other ranks' messages for the first failure") from None


def agree(problem: str | None) -> None:
    """Let every rank know whether any has a problem, so that none waits for one that gave up.

    Raises:
        PartitionError: on every rank, with the first problem, when any rank has one.
        ExecutionError: when a rank is gone.
    """
    found = gather(problem)
    if problem is not None and all(text == problem for text in found):
        raise AgreedError(problem)
    first = next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None), None)
    if first is not None:
        raise AgreedError(first)


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank.

    Raises:
        ExecutionError: when a rank is gone.
    """
    found = [value]
    with peers():
        dist.broadcast_object_list(found, 0)
    return found[0]


@dataclass(frozen=True)
class Group:
    """Some of the processes, by name.

    Whoever holds on to torch's own object keeps its threads alive beyond `destroy_process_group`; at the end of the
    program these may still let go of a tensor, which then aborts the process.
    """

    name: str

    @classmethod
    def of(cls, ranks: Sequence[int] | None = None) -> Group:
        """A new group of processes (None: of all); all processes must ask."""
        found = dist.new_group(None if ranks is None else list(ranks))
        return cls("" if not isinstance(found, dist.ProcessGroup) else found.group_name)

    def resolve(self) -> dist.ProcessGroup:
        """The group itself."""
        return dist.distributed_c10d._resolve_process_group(self.name)  # pyright: ignore


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order.

    Raises:
        ExecutionError: when a rank is gone.
    """
    found: list[Any] = [None] * dist.get_world_size()
    with peers():
        dist.all_gather_object(found, value)
    return found


def check_backend(backend: str, device: str, ranks: int) -> None:
    """Make sure that a backend can serve a number of ranks on this host.

    Raises:
        PartitionError: when NCCL is asked for without a GPU for every rank, or shared memory with one.
    """
    if backend == "shm" and device != "cpu":
        raise PartitionError(f"backend shm moves the memory of this host, not of device '{device}'; use nccl or gloo")
    if backend != "nccl":
        return
    names = device.split(",")
    count = torch.cuda.device_count() if dist.is_nccl_available() else 0
    if count == 0:
        for name in names:
            check_device(name)
        raise PartitionError("backend nccl: torch finds no GPU here; use --backend gloo")
    if not all(name.strip().startswith("cuda") for name in names):
        raise PartitionError(f"backend nccl moves the memory of GPUs, not of device '{device}'; add --device cuda")
    if ranks > count:
        raise PartitionError(f"backend nccl needs a GPU for every rank: {ranks} ranks, {count} GPUs here; "
                             "use --backend gloo, which lets ranks share one")


def rank_device(device: str, place: Place) -> torch.device:
    """The device of a rank: `cpu`, `cuda` (the local rank's GPU, shared when there are fewer), or a list.

    Raises:
        PartitionError: when there is no such device.
    """
    names = device.split(",")
    return check_device(names[place.local_rank % len(names)], place.local_rank)


def check_device(name: str, index: int = 0) -> torch.device:
    """A device by name; plain `cuda` takes the GPU `index` modulo their number.

    Raises:
        PartitionError: when there is no such device.
    """
    try:
        found = torch.device(name.strip())
    except RuntimeError:
        raise PartitionError(f"device '{name}' is unknown; use cpu, cuda or cuda:0,cuda:1") from None
    if found.type not in ("cpu", "cuda"):
        raise PartitionError(f"device '{name}' cannot be used; use cpu, cuda or cuda:0,cuda:1")
    if found.type == "cpu":
        return found
    count = torch.cuda.device_count()
    if count == 0:
        raise PartitionError(f"device '{name}': torch finds no GPU here; use --device cpu")
    numbered = ":" in name
    if numbered and found.index >= count:
        raise PartitionError(f"device '{name}': there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    return found if numbered else torch.device("cuda", index % count)


@dataclass(frozen=True)
class SharedFeed:
    """Inputs from files for one rank of many; what cannot be read at random is streamed by rank 0.

    Args:
        sources: open files; a streamed one only on rank 0, None elsewhere.
        boxes: what every rank owns of each streamed input.
        counted: inputs of which this rank is the first that holds its part.
        tally: per input, how many cells of this part are NaN or infinite; filled while loading.
    """

    sources: dict[str, Source | None]
    boxes: dict[str, Sequence[Any]]
    counted: frozenset[str] = frozenset()
    tally: Tally = field(default_factory=Tally)

    def load(self, name: str, portions: Sequence[Portion]) -> None:
        """See `runtime.feeds.Feed`."""
        (portion,) = portions
        self._fill(name, portion)
        if name in self.counted and self.tally.is_new(name, portion.box):
            self.tally.add(name, not_finite(portion.tensor))

    def _fill(self, name: str, portion: Portion) -> None:
        if name in self.boxes:
            self._stream(name, portion)
            return
        source = self.sources[name]
        assert source is not None
        portion.tensor.copy_(torch.from_numpy(source.read(portion.slices)))

    def _stream(self, name: str, portion: Portion) -> None:
        if portion.rank != 0:
            self._receive(portion)
            return
        source = self.sources[name]
        assert source is not None
        for start, values in source.slabs():
            for rank, part in slab_parts(start, values, self.boxes[name]):
                if rank == 0:
                    fill_from_slab(portion, start, values)
                else:
                    _send(rank, np.maximum(start, [i.start for i in self.boxes[name][rank].intervals()]), part)
        for rank in range(1, dist.get_world_size()):
            _send(rank, np.zeros(portion.tensor.dim(), np.int64), None)

    def _receive(self, portion: Portion) -> None:
        axes = portion.tensor.dim()
        while True:
            head = torch.zeros(2 * axes, dtype=torch.int64)
            with peers([0]):
                dist.recv(head, 0)
            start, shape = head[:axes].tolist(), head[axes:].tolist()
            if not any(shape):
                return
            # as the file's reader hands them out, see `feeds.host_type`
            is_bfloat16 = portion.tensor.dtype == torch.bfloat16
            part = torch.empty(shape, dtype=torch.float32 if is_bfloat16 else portion.tensor.dtype)
            with peers([0]):
                dist.recv(part.view(-1).view(torch.uint8), 0)
            fill_from_slab(portion, start, part.numpy())


def _send(rank: int, start: Any, part: np.ndarray[Any, Any] | None) -> None:
    shape = [0] * len(start) if part is None else list(part.shape)
    with peers([rank]):
        dist.send(torch.tensor([*map(int, start), *shape], dtype=torch.int64), rank)
        if part is not None:
            dist.send(torch.from_numpy(part).view(-1).view(torch.uint8), rank)
