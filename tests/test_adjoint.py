"""The adjoints of the communication steps: <E x, y> == <x, E' y>, in lock-step and between processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from partitioner import dialect
from partitioner.exchange import plan_exchange
from partitioner.geometry import Interval, Pieces, pieces
from partitioner.layout import AxisLayout, Layout
from partitioner.mesh import Mesh
from runtime.adjoint import AllReduceSide, ExchangeSide, all_reduce_adjoint, exchange_adjoint
from runtime.executor import Shard, jobs_of
from runtime.memory import allocate_buffer, view
from runtime.program import AllReduce, Exchange, Program, localise
from runtime.transports import Transport
from runtime.transports.lockstep import Lockstep
from tests.command import environment

CPU = torch.device("cpu")
AXES = ("batch", "depth", "height", "width")


# --- random exchanges --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A value that goes from one layout to another."""

    mesh: Mesh
    owned: Layout
    needed: Layout
    storage: str
    dtype: ir.DataType

    def programs(self) -> list[Program]:
        """The program of every rank: one exchange."""
        return [localise(self.model(), rank) for rank in self.mesh]

    def model(self) -> ir.Model:
        x = ir.Value(name="x", shape=ir.Shape(self.owned.shape), type=ir.TensorType(self.dtype))
        dialect.set_layout(x, self.owned)
        halo = all(a is None or (b is not None and a.mesh_axis == b.mesh_axis)
                   for a, b in zip(self.owned.axes, self.needed.axes, strict=True))
        node = dialect.new_exchange(dialect.HALO_EXCHANGE if halo else dialect.RESHARD, x, self.needed, "y")
        graph = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 18}, name="g")
        found = ir.Model(graph, ir_version=10)
        dialect.set_mesh(found, self.mesh)
        dialect.set_storage(found, self.storage)
        return found


def cuts(random: np.random.Generator, n: int, shards: int) -> tuple[int, ...]:
    """Ascending, and equal ones are empty shards."""
    return (0, *sorted(int(c) for c in random.integers(0, n + 1, shards - 1)), n)


def some_pieces(random: np.random.Generator, n: int) -> Pieces:
    """None, one or several intervals."""
    bounds = [sorted(random.integers(0, n + 1, 2).tolist()) for _ in range(random.integers(0, 4))]
    return pieces(Interval(a, b) for a, b in bounds)


def widened(random: np.random.Generator, split: AxisLayout, n: int) -> AxisLayout:
    """The same shards with halos, some of them wider than a neighbour."""
    lo, hi = random.integers(0, 4, 2).tolist()
    return AxisLayout(split.mesh_axis, tuple(
        pieces(Interval(max(0, i.start - lo), min(n, i.stop + hi)) for i in part) for part in split.parts))


def random_case(random: np.random.Generator, size: int | None = None) -> Case:
    """A mesh (of a size if given), a disjoint layout and one that may overlap or leave cells out."""
    counts = [(size,)] if size else [(2,), (3,), (2, 2), (3, 2), (2, 3, 2)]
    chosen = counts[random.integers(len(counts))]
    names = sorted(random.choice(len(AXES), len(chosen), replace=False).tolist())
    mesh = Mesh(tuple((AXES[i], n) for i, n in zip(names, chosen, strict=True)))
    shape = tuple(int(n) for n in random.integers(1, 9, random.integers(2, 6)))
    owned, needed = Layout.replicated(shape), Layout.replicated(shape)
    for name, axis in zip(mesh.names, random.permutation(len(shape)).tolist(), strict=False):
        if random.random() < 0.8:
            owned = owned.with_axis(axis, AxisLayout.from_cuts(name, cuts(random, shape[axis], mesh.count(name))))
    if random.random() < 0.5:
        for axis, split in enumerate(owned.axes):
            needed = needed.with_axis(axis, None if split is None else widened(random, split, shape[axis]))
    else:
        for name, axis in zip(mesh.names, random.permutation(len(shape)).tolist(), strict=False):
            parts = tuple(some_pieces(random, shape[axis]) for _ in range(mesh.count(name)))
            if random.random() < 0.7:
                needed = needed.with_axis(axis, AxisLayout(name, parts))
    dtype = ir.DataType.INT64 if random.random() < 0.5 else ir.DataType.DOUBLE
    return Case(mesh, owned, needed, str(random.choice(["channels_last", "channels_first"])), dtype)


def filled(like: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    values = random.integers(-99, 99, tuple(like.shape))
    return like.copy_(torch.from_numpy(values).to(like.dtype))


def action_of(program: Program) -> Exchange:
    (found,) = [s.action for s in program.steps if isinstance(s.action, Exchange)]
    return found


def products(programs: Sequence[Program], transport: Transport, seed: int) -> tuple[int, int]:
    """<E x, y> and <x, E' y> over the ranks of this process; x and y depend on seed and rank alone."""
    shards = [Shard(program, CPU, {}) for program in programs]
    actions = [action_of(program) for program in programs]
    inputs, cotangents, sources = [], [], []
    for shard, action in zip(shards, actions, strict=True):
        random = np.random.default_rng([seed, shard.program.rank])
        spec = shard.program.buffers[action.source.buffer]
        junk = filled(allocate_buffer(spec, CPU, shard.program.storage, False), random)  # what a halo holds before
        shard.buffers[action.source.buffer] = junk
        inputs.append(view(junk, action.source).clone())
        target = shard.program.buffers[action.target]
        cotangents.append(filled(allocate_buffer(target, CPU, shard.program.storage, False), random))
        sources.append(allocate_buffer(spec, CPU, shard.program.storage, False).zero_())
    transport.exchange(jobs_of(list(zip(shards, actions, strict=True))))
    forward = sum(int((s.buffers[a.target] * y).sum()) for s, a, y in zip(shards, actions, cotangents, strict=True))
    kept = [y.clone() for y in cotangents]
    sides = [ExchangeSide(s.program.rank, a, y, x)
             for s, a, y, x in zip(shards, actions, cotangents, sources, strict=True)]
    exchange_adjoint(transport, sides, programs[0].storage)
    assert all(torch.equal(a, b) for a, b in zip(kept, cotangents, strict=True))
    backward = 0
    for action, x, source in zip(actions, inputs, sources, strict=True):
        backward += int((view(source, action.source) * x).sum())
        outside = source.clone()
        view_of_owned = view(outside, action.source)
        if action.source.is_dense:
            view_of_owned.zero_()
            assert not outside.any(), "cotangents outside of what the rank owns"
    return forward, backward


@pytest.mark.parametrize("seed", range(120))
def test_exchanges_in_lockstep(seed: int) -> None:
    case = random_case(np.random.default_rng(seed))
    forward, backward = products(case.programs(), Lockstep(case.mesh.size), seed)
    assert forward == backward, f"{case.owned} -> {case.needed} on {case.mesh}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 4000, 100))
def test_many_exchanges_in_lockstep(seed: int) -> None:
    for more in range(100):
        case = random_case(np.random.default_rng(seed + more))
        forward, backward = products(case.programs(), Lockstep(case.mesh.size), seed)
        assert forward == backward, f"{case.owned} -> {case.needed} on {case.mesh}"


def test_the_random_cases_are_of_all_kinds() -> None:
    """Halos, re-layouts, gathers, empty shards, several pieces, shared and separate buffers, cells nobody needs."""
    kinds: set[str] = set()
    for seed in range(120):
        case = random_case(np.random.default_rng(seed))
        splits = [s for s in (*case.owned.axes, *case.needed.axes) if s is not None]
        kinds |= {"empty shard" for s in splits for p in s.parts if not p}
        kinds |= {"several pieces" for s in splits for p in s.parts if len(p) > 1}
        kinds |= {case.storage, case.dtype.name, f"{len(case.mesh.axes)} mesh axes"}
        for program in case.programs():
            action = action_of(program)
            kinds.add("shared" if action.source.buffer == action.target else "separate")
            kinds |= {"message" for _ in action.sends}
        if case.owned.mesh_axes - case.needed.mesh_axes:
            kinds.add("gather")
        if case.needed.mesh_axes - case.owned.mesh_axes:
            kinds.add("scatter")
    assert kinds >= {"empty shard", "several pieces", "channels_last", "channels_first", "INT64", "DOUBLE", "shared",
                     "separate", "message", "gather", "scatter", "1 mesh axes", "2 mesh axes", "3 mesh axes"}


def test_a_halo_comes_home() -> None:
    """By hand: 7 cells on two ranks with one cell of halo."""
    mesh = Mesh((("depth", 2),))
    owned = Layout((7,), (AxisLayout.from_cuts("depth", (0, 4, 7)),))
    needed = Layout((7,), (AxisLayout("depth", ((Interval(0, 5),), (Interval(3, 7),))),))
    programs = Case(mesh, owned, needed, "channels_first", ir.DataType.INT64).programs()
    cotangents = [torch.tensor([1, 2, 3, 4, 50]), torch.tensor([60, 7, 8, 9])]
    sources = [torch.zeros(5, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)]
    transport = Lockstep(2)
    exchange_adjoint(transport, [ExchangeSide(r, action_of(programs[r]), cotangents[r], sources[r]) for r in range(2)])
    assert sources[0].tolist() == [1, 2, 3, 64, 0] and sources[1].tolist() == [0, 57, 8, 9]
    assert transport.traffic.sent == {0: 8, 1: 8} and transport.traffic.messages == {0: 1, 1: 1}


def test_the_adjoint_moves_what_the_exchange_moves() -> None:
    for seed in range(30):
        case = random_case(np.random.default_rng(seed))
        plan = plan_exchange(case.mesh, case.owned, case.needed)
        for rank in case.mesh:
            part = plan.for_rank(rank)
            assert part.adjoint().adjoint() == part and part.adjoint().keep == part.keep
            assert [(t.target, t.box) for t in part.adjoint().sends] == [(t.source, t.box) for t in part.receives]
        there, back = Lockstep(case.mesh.size), Lockstep(case.mesh.size)
        products(case.programs(), there, seed)
        total = case.dtype.itemsize * plan.traffic.total
        assert sum(there.traffic.sent.values()) == 2 * total
        assert sum(back.traffic.sent.values()) == 0


# --- all-reduce --------------------------------------------------------------------------------------


def sums(mesh: Mesh, names: tuple[str, ...], kind: str = "sum") -> list[AllReduce]:
    """The all-reduce of every rank over some mesh axes."""
    found = []
    for rank in mesh:
        here = mesh.coordinates(rank)
        groups = tuple(tuple(mesh.rank({**here, name: i}) for i in range(mesh.count(name))) for name in names)
        found.append(AllReduce("sum", kind, (), (), groups))
    return found


def forward_sums(mesh: Mesh, names: tuple[str, ...], x: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Written down once more, from coordinates alone."""
    at = [mesh.coordinates(rank) for rank in mesh]
    alike = [[s for s in mesh if all(at[r][n] == at[s][n] for n in mesh.names if n not in names)] for r in mesh]
    return [torch.stack([x[s] for s in group]).sum(0) for group in alike]


@pytest.mark.parametrize("names", [("depth",), ("height",), ("depth", "height"), ("height", "depth"), ()])
def test_sums_in_lockstep(names: tuple[str, ...]) -> None:
    mesh = Mesh((("depth", 3), ("height", 2)))
    generator = torch.Generator().manual_seed(0)
    x, y = (list(torch.randint(-99, 99, (mesh.size, 2, 5), generator=generator)) for _ in range(2))
    sides = [AllReduceSide(r, action, (y[r],)) for r, action in zip(mesh, sums(mesh, names), strict=True)]
    back = [tensors[0] for tensors in all_reduce_adjoint(Lockstep(mesh.size), sides)]
    forward = sum(int((a * b).sum()) for a, b in zip(forward_sums(mesh, names, x), y, strict=True))
    backward = sum(int((a * b).sum()) for a, b in zip(x, back, strict=True))
    assert forward == backward
    assert all(torch.equal(a, b) for a, b in zip(back, forward_sums(mesh, names, y), strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(back, y, strict=True))


@pytest.mark.parametrize("kind", ["max", "min", "moments"])
def test_what_is_not_linear_has_no_adjoint(kind: str) -> None:
    mesh = Mesh((("depth", 2),))
    actions = sums(mesh, ("depth",), kind)
    sides = [AllReduceSide(r, action, (torch.ones(1),)) for r, action in zip(mesh, actions, strict=True)]
    with pytest.raises(ValueError, match=f"kind {kind} is not linear"):
        all_reduce_adjoint(Lockstep(2), sides)


# --- between processes -------------------------------------------------------------------------------

RANKS = 3
CASES = range(60)


def test_the_same_between_processes(tmp_path: Path) -> None:
    """Three processes over gloo: their shares of both products add up, and to those of lock-step."""
    script = "import sys; from tests.test_adjoint import serve; serve(int(sys.argv[1]), sys.argv[2])"
    processes = [subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)], text=True,
                                  env=environment(GLOO_SOCKET_IFNAME="lo"), stderr=subprocess.PIPE)
                 for rank in range(RANKS)]
    errors = [p.communicate(timeout=180)[1] for p in processes]
    assert [p.returncode for p in processes] == [0] * RANKS, "\n".join(errors)
    shares = np.stack([np.load(tmp_path / f"{rank}.npy") for rank in range(RANKS)]).sum(axis=0)
    assert shares.shape == (len(CASES) + 1, 2)
    for seed, (forward, backward) in zip(CASES, shares, strict=False):
        case = random_case(np.random.default_rng(seed), RANKS)
        assert forward == backward, f"{case.owned} -> {case.needed}"
        assert (forward, backward) == products(case.programs(), Lockstep(RANKS), seed)
    assert shares[-1][0] == shares[-1][1] != 0


def serve(rank: int, folder: str) -> None:
    """One rank's share of the products of every case."""
    import torch.distributed as dist

    from runtime.transports.distributed import Distributed

    dist.init_process_group("gloo", init_method=(Path(folder) / "rendezvous").as_uri(), rank=rank, world_size=RANKS)
    transport = Distributed(CPU, "gloo")
    found = []
    for seed in CASES:
        case = random_case(np.random.default_rng(seed), RANKS)
        found.append(products([case.programs()[rank]], transport, seed))
    mesh = Mesh((("depth", RANKS),))
    x, y = (torch.arange(1, 8) * (rank + 2) + offset for offset in (0, 5))
    (back,) = all_reduce_adjoint(transport, [AllReduceSide(rank, sums(mesh, ("depth",))[rank], (y,))])
    total = sum((torch.arange(1, 8) * (r + 2) for r in range(RANKS)), torch.zeros(7, dtype=torch.int64))
    found.append((int((total * y).sum()), int((x * back[0]).sum())))
    np.save(Path(folder) / f"{rank}.npy", np.array(found))
    dist.barrier()
    dist.destroy_process_group()


def test_wide_halos_reach_over_several_shards() -> None:
    """Shards of one cell and a halo of three: every cotangent comes from up to seven ranks."""
    mesh = Mesh((("width", 5),))
    split = AxisLayout.from_cuts("width", (0, 1, 2, 3, 4, 5))
    wide = AxisLayout("width", tuple((Interval(max(0, i - 3), min(5, i + 4)),) for i in range(5)))
    case = Case(mesh, Layout((2, 5), (None, split)), Layout((2, 5), (None, wide)), "channels_first", ir.DataType.INT64)
    programs = case.programs()
    ones = [torch.ones(programs[r].buffers[action_of(programs[r]).target].box.shape, dtype=torch.int64) for r in mesh]
    sources = [torch.zeros_like(t) for t in ones]
    exchange_adjoint(Lockstep(5), [ExchangeSide(r, action_of(programs[r]), ones[r], sources[r]) for r in mesh])
    counts = [int(view(sources[r], action_of(programs[r]).source)[0, 0]) for r in mesh]
    assert counts == [4, 5, 5, 5, 4]
