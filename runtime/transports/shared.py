"""Ranks of one host, over shared memory: a message is a copy into a block and a copy out of it.

    sender                                 receiver
    take a free block, or make one
    copy the cells in
    D block, bytes   ------------------->  copy the cells out
    the block is free  <-----------------  A block

A pair of ranks has a Unix socket, over which the notices go and new blocks are handed on (as descriptors of memory
that has no name, so that nothing is left behind).  A sender never waits: where no block is free it makes another.
"""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import struct
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from partitioner.errors import ExecutionError, PartitionError
from runtime.group import GONE, TIMEOUT, gather
from runtime.transports.base import Handle, Job, Parcel, Traffic, as_bytes, pieces

_NOTICE = struct.Struct("=cQQ")
_SECONDS = struct.Struct("@ll")
_DATA, _BLOCK, _ACK = b"D", b"B", b"A"

LONGEST = 70
"""Bytes of the path of a folder for temporary files, up to which sockets can be in it."""

SMALLEST = 1 << 14
"""Bytes of a block, at least; others are powers of two."""


@dataclass
class _Peer:
    """The way to one other rank.

    Args:
        number: its rank.
        blocks: that we write to, by number; `free` are those that have been read.
        theirs: blocks that we read from.
        arrived: block and bytes of the messages that are there.
    """

    number: int
    socket: socket.socket
    blocks: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    free: set[int] = field(default_factory=set[int])
    theirs: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    arrived: deque[tuple[int, int]] = field(default_factory=deque[tuple[int, int]])

    def send(self, parcel: Parcel) -> None:
        """Copy a message into a block and tell of it."""
        while self._listen(wait=False):
            pass
        number = self._room(parcel.nbytes)
        block, dense = self.blocks[number][: parcel.nbytes], as_bytes(parcel)
        if dense is not None:
            block.copy_(dense)
        else:
            for view, part in pieces(block, parcel):
                part.copy_(view)
        self._tell(_DATA, number, parcel.nbytes)

    def receive(self, parcel: Parcel) -> None:
        """Wait for the next message and copy it to its place."""
        while not self.arrived:
            self._listen(wait=True)
        number, nbytes = self.arrived.popleft()
        assert nbytes == parcel.nbytes, f"rank {self.number} sent {nbytes} bytes, not {parcel.nbytes}"
        block, dense = self.theirs[number][:nbytes], as_bytes(parcel)
        if dense is not None:
            dense.copy_(block)
        else:
            for view, part in pieces(block, parcel):
                view.copy_(part)
        self._tell(_ACK, number, 0)

    def _room(self, nbytes: int) -> int:
        """A block that is free and large enough."""
        fitting = [n for n in self.free if self.blocks[n].numel() >= nbytes]
        if fitting:
            found = min(fitting, key=lambda n: self.blocks[n].numel())
            self.free.remove(found)
            return found
        size = max(SMALLEST, 1 << max(0, nbytes - 1).bit_length())
        number, descriptor = len(self.blocks), _nameless(size)
        try:
            self.blocks[number] = _mapped(descriptor, size)
            with _peer_is_there(self.number):
                socket.send_fds(self.socket, [_NOTICE.pack(_BLOCK, number, size)], [descriptor])
        finally:
            os.close(descriptor)
        return number

    def _tell(self, kind: bytes, block: int, nbytes: int) -> None:
        with _peer_is_there(self.number):
            self.socket.sendall(_NOTICE.pack(kind, block, nbytes))

    def _listen(self, wait: bool) -> bool:
        """Take one notice in; whether there was one."""
        with _peer_is_there(self.number):
            try:
                flags = socket.MSG_WAITALL if wait else socket.MSG_DONTWAIT
                said, beside, _, _ = self.socket.recvmsg(_NOTICE.size, socket.CMSG_LEN(4), flags)
            except BlockingIOError:
                if not wait:
                    return False
                raise TimeoutError(f"it has not answered for {TIMEOUT}") from None
            while 0 < len(said) < _NOTICE.size:
                said += self.socket.recv(_NOTICE.size - len(said))
            if not said:
                raise ConnectionResetError("it has ended")
        kind, block, nbytes = _NOTICE.unpack(said)
        if kind == _DATA:
            self.arrived.append((block, nbytes))
        elif kind == _ACK:
            self.free.add(block)
        else:
            (descriptor,) = struct.unpack("=i", beside[0][2][:4])
            self.theirs[block] = _mapped(descriptor, nbytes)
            os.close(descriptor)
        return True


class _peer_is_there:
    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise ExecutionError(f"rank {dist.get_rank()}: {GONE} ranks {[self._number]} failed "
                                 f"({error.strerror or error}); see the other ranks' messages for the first failure"
                                 ) from None


@dataclass(frozen=True)
class _Flight:
    """Messages that are there, or will be."""

    receives: tuple[tuple[_Peer, Parcel], ...]

    def wait(self) -> None:
        """See `Handle`."""
        for peer, parcel in self.receives:
            peer.receive(parcel)


class SharedMemory:
    """Point-to-point messages between processes of one host; all of the process group make one at the same time.

    Args:
        processes: which process has which rank; all of the group, in order, when not given.

    Raises:
        PartitionError: on every rank, when the ranks of anyone are on several hosts or have no such sockets.
    """

    def __init__(self, processes: Sequence[int] | None = None) -> None:
        processes = processes or range(dist.get_world_size())
        mine = processes.index(dist.get_rank())
        self.ranks = (mine,)
        self.traffic = Traffic()
        if not on_one_host(processes):
            raise PartitionError("backend shm serves ranks of one host; use backend gloo")
        folder = _doors() if mine == 0 else None
        try:
            self._peers = _connected(Path(str(gather(folder)[processes[0]])), mine, len(processes))
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def exchange(self, jobs: Sequence[Job]) -> None:
        """Send and receive all parcels of one step; see `Transport`."""
        self.post(jobs).wait()

    def post(self, jobs: Sequence[Job]) -> Handle:
        """Copy what is sent into blocks; what comes is copied when it is waited for.  See `Transport`."""
        (job,) = jobs
        for parcel in job.sends:
            self._peers[parcel.peer].send(parcel)
            self.traffic.count(job.rank, parcel.nbytes)
        return _Flight(tuple((self._peers[parcel.peer], parcel) for parcel in job.receives))


def _doors() -> str:
    """A new folder for sockets, whose paths have room for some hundred characters only."""
    usual = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="pt-", dir=usual if len(os.fsencode(usual)) < LONGEST else "/tmp")


def on_one_host(processes: Sequence[int]) -> bool:
    """Whether these processes can share memory, and so can those that every other process asks for."""
    hosts = gather((socket.gethostname(), _boot()))
    return all(gather(len({hosts[p] for p in processes}) == 1 and hasattr(socket, "AF_UNIX")))


def _connected(folder: Path, mine: int, size: int) -> dict[int, _Peer]:
    """The ways to all other ranks: the higher one of two comes to the door of the lower one."""
    found: dict[int, _Peer] = {}
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(folder / str(mine)))
        door.listen(size)
        gather(None)  # every door is there
        for other in range(mine):
            with _peer_is_there(other):
                way = socket.socket(socket.AF_UNIX)
                way.connect(str(folder / str(other)))
                way.sendall(mine.to_bytes(4, "little"))
                found[other] = _Peer(other, way)
        for _ in range(mine + 1, size):
            with _peer_is_there(mine):
                way, _ = door.accept()
                other = int.from_bytes(way.recv(4, socket.MSG_WAITALL), "little")
                found[other] = _Peer(other, way)
        for peer in found.values():
            patience = _SECONDS.pack(int(TIMEOUT.total_seconds()), 0)
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        gather(None)  # nobody needs the doors any more
    return found


def _boot() -> str:
    """Which start of which machine this is."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        return ""


def _nameless(size: int) -> int:
    """A descriptor of memory that vanishes with its last user."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("partitioner")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (its descriptor is handed on)
        descriptor = os.dup(file.fileno())
        file.close()
    os.ftruncate(descriptor, size)
    return descriptor


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
