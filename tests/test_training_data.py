"""Data for training: what ranks read assembles to the same volumes on every mesh; ranks that differ all refuse."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import partitioner as pt
from partitioner.errors import ExecutionError, PartitionError
from partitioner.geometry import Box, Interval, span
from runtime.training import cases, data
from runtime.training.augment import normal
from runtime.training.data import Crop, Flip, Intensity, Volumes
from runtime.volumes import open_source

SPACE = (9, 7, 5)
AUGMENT = (Crop(), Flip(("depth", 1, "width")), Intensity(noise=0.3))

Cuts = Sequence[Sequence[int]]
"""Per axis (batch, then space) the cuts."""


@dataclass(frozen=True)
class StandIn:
    """A module's place among ranks, without a network."""

    boxes: Mapping[str, Box] = field(default_factory=dict)
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"volume": (2, 1, *SPACE),
                                                                          "logits": (2, 3, *SPACE)})
    replica: int = 0
    replicas: int = 1
    gatherer: Callable[[Any], list[Any]] = lambda value: [value]
    dtype: torch.dtype = torch.float32

    input_names = ("volume",)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.whole if name not in self.input_names)

    @property
    def is_distributed(self) -> bool:
        return bool(self.boxes)

    def extents(self, name: str) -> tuple[int, ...]:
        return self.whole[name]

    def own_box(self, name: str) -> Box:
        return self.boxes.get(name, Box.whole(self.whole[name]))

    def gather(self, value: Any) -> list[Any]:
        return self.gatherer(value)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter([nn.Parameter(torch.zeros(1, dtype=self.dtype))])


def ranks(cuts: Cuts, whole: StandIn, **others: Any) -> list[StandIn]:
    """A stand-in per rank of a mesh with these cuts of batch and space."""
    pairs = [list(itertools.pairwise(c)) for c in cuts]
    return [StandIn({name: Box((span(*cell[0]), span(0, shape[1]), *(span(*c) for c in cell[1:])))
                     for name, shape in whole.whole.items()}, whole.whole, dtype=whole.dtype, **others)
            for cell in itertools.product(*pairs)]


MESHES: dict[str, Cuts] = {
    "one": [(0, 2), (0, 9), (0, 7), (0, 5)],
    "depth=2": [(0, 2), (0, 4, 9), (0, 7), (0, 5)],
    "uneven, one empty": [(0, 2), (0, 1, 1, 9), (0, 7), (0, 5)],
    "depth=2,height=2": [(0, 2), (0, 5, 9), (0, 3, 7), (0, 5)],
    "batch=2,width=3": [(0, 1, 2), (0, 9), (0, 7), (0, 1, 4, 5)],
}


@pytest.fixture
def samples(tmp_path: Path) -> list[dict[str, Any]]:
    """Five cases of all forms, larger than the plan by 4, 0 and 3 cells."""
    found: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for i in range(5):
        image = rng.standard_normal((13, 7, 8)).astype(np.float32)
        labels = rng.integers(0, 3, (13, 7, 8)).astype(np.uint8)
        np.save(tmp_path / f"ct{i}.npy", image if i % 2 else image[None])
        nibabel.Nifti1Image(labels, np.eye(4)).to_filename(tmp_path / f"seg{i}.nii")
        found.append({"volume": tmp_path / f"ct{i}.npy", "labels": str(tmp_path / f"seg{i}.nii")})
    found[3] = {"volume": np.load(tmp_path / "ct3.npy"),
                "labels": torch.from_numpy(nibabel.load(tmp_path / "seg3.nii").get_fdata())}
    return found


def assemble(modules: Sequence[StandIn], iterators: Sequence[Iterator[dict[str, torch.Tensor]]],
             ) -> Iterator[dict[str, torch.Tensor]]:
    """The whole volumes of every step, from the parts of all ranks."""
    for parts in zip(*iterators, strict=True):
        whole = {"volume": torch.full((2, 1, *SPACE), torch.nan), "labels": torch.full((2, *SPACE), -1)}
        for module, part in zip(modules, parts, strict=True):
            box = [slice(i.start, i.stop) for i in module.own_box("volume").intervals()]
            whole["volume"][tuple(box)] = part["volume"]
            whole["labels"][box[0], *box[2:]] = part["labels"]
        yield whole


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("augment", [(), AUGMENT])
def test_every_mesh_reads_the_same_volumes(mesh: str, augment: Any, samples: list[dict[str, Any]]) -> None:
    alone = Volumes(StandIn(), samples, augment, seed=3)
    modules = ranks(MESHES[mesh], StandIn())
    each = [Volumes(module, samples, augment, seed=3) for module in modules]
    for epoch in (0, 7):
        for volumes in (alone, *each):
            volumes.set_epoch(epoch)
        found = list(assemble(modules, [iter(volumes) for volumes in each]))
        expected = list(alone)
        assert len(found) == len(expected) == len(alone) == 3
        for whole, same in zip(expected, found, strict=True):
            assert torch.equal(whole["volume"], same["volume"])
            assert torch.equal(whole["labels"], same["labels"])
            assert whole["volume"].dtype == torch.float32
            assert whole["labels"].dtype == torch.int64


def test_what_augmentations_do(samples: list[dict[str, Any]]) -> None:
    """Without noise every augmented case is found again in its file: mirrored, moved, and linear in the values."""
    volumes = Volumes(StandIn(), samples, (Crop(), Flip((0, 2)), Intensity((2, 3), (5, 6))), shuffle=False)
    seen: set[tuple[Any, ...]] = set()
    for epoch in range(8):
        volumes.set_epoch(epoch)
        for step, part in enumerate(volumes):
            for i in range(2):
                sample = samples[(2 * step + i) % 5]
                image, labels = (cases._to_numpy(v) if not isinstance(v, str | Path) else open_source(v).read()
                                 for v in (sample["volume"], sample["labels"]))
                seen.add(find(image.reshape(13, 7, 8), labels.reshape(13, 7, 8), part["volume"][i, 0].numpy(),
                              part["labels"][i].numpy()))
    flips, places = {s[0] for s in seen}, {s[1] for s in seen}
    assert flips == set(itertools.product((False, True), (False,), (False, True)))
    assert {p[0] for p in places} == set(range(5))
    assert {p[2] for p in places} == set(range(4))


def find(image: np.ndarray, labels: np.ndarray, found: np.ndarray, its: np.ndarray) -> tuple[Any, ...]:
    """Where a part comes from, by its labels; its values are then linear in those there."""
    for flips in itertools.product((False, True), repeat=3):
        axes = tuple(a for a in range(3) if flips[a])
        for place in itertools.product(range(5), (0,), range(4)):
            cells = tuple(slice(p, p + n) for p, n in zip(place, SPACE, strict=True))
            if np.array_equal(np.flip(labels[cells], axes), its):
                slope, shift = np.polyfit(np.flip(image[cells], axes).ravel(), found.ravel(), 1)
                assert 2 <= slope <= 3
                assert 5 <= shift <= 6
                np.testing.assert_allclose(np.flip(image[cells], axes) * slope + shift, found, atol=1e-4)
                return flips, place
    raise AssertionError("the labels are nowhere in the file")


def test_the_middle_is_taken_without_a_crop(samples: list[dict[str, Any]]) -> None:
    part = next(iter(Volumes(StandIn(), samples, shuffle=False)))
    np.testing.assert_array_equal(part["volume"][0], np.load(samples[0]["volume"])[:, 2:11, :, 1:6])


def test_noise_is_normal_and_fresh() -> None:
    shape = (1, 40, 40, 40)
    whole = normal(Box.whole(shape), shape, 5, 0)
    assert abs(float(whole.mean())) < 0.01
    assert abs(float(whole.std()) - 1) < 0.01
    assert abs(float((whole**4).mean()) - 3) < 0.1
    part = normal(Box((span(0, 1), span(7, 20), span(0, 40), span(3, 4))), shape, 5, 0)
    assert torch.equal(part, whole[:, 7:20, :, 3:4])
    for other in (normal(Box.whole(shape), shape, 6, 0), normal(Box.whole(shape), shape, 5, 1)):
        assert abs(float((whole * other).mean())) < 0.02


def test_a_rank_reads_its_box_and_no_more(samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, list[int]] = {}

    def counting(*args: Any) -> Any:
        source = open_source(*args)
        inner = source.read

        def count(box: Sequence[Interval]) -> Any:
            values = inner(box)
            read.setdefault(Path(args[0]).name, []).append(values.size)
            return values

        source.read = count  # type: ignore[method-assign]
        return source

    monkeypatch.setattr(cases, "open_source", counting)
    module = ranks(MESHES["batch=2,width=3"], StandIn())[1]  # the first case of each step, width [1, 4)
    list(Volumes(module, samples, AUGMENT, shuffle=False))
    mine = 9 * 7 * 3
    assert read == {name: [mine] for i in (0, 2, 4) for name in (f"ct{i}.npy", f"seg{i}.nii")}
    read.clear()
    empty = ranks(MESHES["uneven, one empty"], StandIn())[1]
    found = list(Volumes(empty, samples, AUGMENT))
    assert read == {}
    assert found[0]["volume"].shape == (2, 1, 0, 7, 5)
    assert found[0]["labels"].shape == (2, 0, 7, 5)


@pytest.mark.parametrize("shuffle", [False, True])
def test_replicas_take_different_cases(samples: list[dict[str, Any]], shuffle: bool) -> None:
    """Two copies of a batch of 2 see what one copy with a batch of 4 sees."""
    large = StandIn(whole={"volume": (4, 1, *SPACE), "logits": (4, 3, *SPACE)})
    expected = list(Volumes(large, samples, AUGMENT, shuffle=shuffle))
    found = [list(Volumes(StandIn(replica=r, replicas=2), samples, AUGMENT, shuffle=shuffle)) for r in (0, 1)]
    assert [len(f) for f in found] == [2, 2] == [len(expected)] * 2
    for whole, *parts in zip(expected, *found, strict=True):
        for name in ("volume", "labels"):
            assert torch.equal(whole[name], torch.cat([p[name] for p in parts]))


def test_an_epoch_has_every_case_and_an_order_of_its_own() -> None:
    samples = [{"volume": np.full(SPACE, i, np.float32), "labels": np.full(SPACE, i)} for i in range(20)]
    volumes = Volumes(StandIn(), samples)
    orders: list[list[int]] = []
    for epoch in (0, 1, 0):
        volumes.set_epoch(epoch)
        orders.append([int(v) for part in volumes for v in part["labels"][:, 0, 0, 0]])
        assert sorted(orders[-1]) == list(range(20))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_forms_of_targets() -> None:
    module = StandIn(dtype=torch.float64)
    sample = {"volume": np.zeros(SPACE), "labels": np.ones((1, *SPACE), bool), "mask": np.ones(SPACE, np.uint8),
              "target": np.ones((3, *SPACE), np.float32), "several": np.ones((3, *SPACE), np.int16)}
    part = next(iter(Volumes(module, [sample, sample], [Flip((0,))], labels=("labels", "several"))))
    assert {name: (tuple(t.shape[1:-3]), t.dtype) for name, t in part.items()} == {
        "volume": ((1,), torch.float64), "labels": ((), torch.int64), "mask": ((1,), torch.float64),
        "target": ((3,), torch.float64), "several": ((3,), torch.int64)}


def test_outputs_of_other_extents() -> None:
    """Beside a network that takes a border away files of equal extents, beside a classifier a number per case."""
    image = np.arange(13 * 11 * 9, dtype=np.float32).reshape(13, 11, 9)
    valid = StandIn(whole={"volume": (1, 1, *SPACE), "logits": (1, 3, 5, 3, 1)})
    for augment in ((), (Crop(),), (Crop(), Flip((0, 1, 2)))):
        for part in Volumes(valid, [{"volume": image, "labels": image}] * 9, augment):
            assert torch.equal(part["volume"][:, 0, 2:-2, 2:-2, 2:-2], part["labels"].float())
    classes = StandIn(whole={"volume": (2, 1, *SPACE), "scores": (2, 4)})
    (part,) = Volumes(classes, [{"volume": image, "labels": 2}, {"volume": image, "labels": 3}], AUGMENT, shuffle=False)
    assert part["labels"].tolist() == [2, 3]


def refused(pattern: str) -> Any:
    return pytest.raises(PartitionError, match=pattern)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", np.zeros((9, 7, 4), np.float32))
    np.save(tmp_path / "good.npy", np.zeros(SPACE, np.float32))
    np.save(tmp_path / "large.npy", np.zeros((11, 7, 5), np.float32))
    good = tmp_path / "good.npy"
    with refused(r"(?s)none\.npy: no such file.*small\.npy: 'labels' is 9x7x4 cells, smaller than the plan's 9x7x5; .*"
                 r"sample 2 has no labels, also label; give volume, labels.*"
                 r"sample 3: 'volume' has extents 63x5, the plan takes 1x9x7x5 of a case.*"
                 r"sample 4: 'volume' has 2 channels, the plan takes 1.*sample 4: 'labels' has 2 channels, the plan "
                 r"gives 3; give 3 or 1.*large\.npy: 'labels' has 2x0x0 cells more .* do not correspond.*"
                 r"sample 6: 'volume' holds <U1 values.*sample 7: 'labels' has other channels than in .*good\.npy"):
        Volumes(StandIn(), [
            {"volume": good, "labels": good},
            {"volume": tmp_path / "none.npy", "labels": tmp_path / "small.npy"},
            {"volume": good, "label": good},
            {"volume": np.zeros((63, 5)), "labels": good},
            {"volume": np.zeros((2, *SPACE)), "labels": np.zeros((2, *SPACE))},
            {"volume": good, "labels": tmp_path / "large.npy"},
            {"volume": np.full(SPACE, "a"), "labels": good},
            {"volume": good, "labels": np.zeros((3, *SPACE))},
        ])
    with refused(r"(?s)\A([^\n]*none[^\n]*\n){20}and 5 more\Z"):
        Volumes(StandIn(), [{"volume": f"none{i}.npy"} for i in range(25)])


@pytest.mark.parametrize(("module", "options", "pattern"), [
    (StandIn(), {"seed": -1}, "seed -1 is negative"),
    (StandIn(), {"augment": (Flip((3,)),)}, r"no spatial axis 3; use 0 \(depth\), 1 \(height\), 2 \(width\)"),
    (StandIn(), {"augment": (Flip(("z",)), Crop(), Crop())}, r"(?s)several Crop.*no spatial axis 'z'"),
    (StandIn(), {"output": "x"}, "no output 'x'; it has logits"),
    (StandIn(whole={"volume": (2, 1, 5), "a": (2, 1, 5), "b": (2, 1, 5)}), {}, "labels: the module has the outputs"),
    (StandIn(whole={"volume": (2, 1, 5), "a": (1, 1, 5)}), {}, r"different batches \(1, 2\)"),
    (StandIn(whole={"volume": (2, 1, 5), "a": (2,)}), {}, r"'labels' would have extents \(2,\)"),
])
def test_options_that_do_not_fit(module: StandIn, options: dict[str, Any], pattern: str) -> None:
    with refused(pattern):
        Volumes(module, [{"volume": np.zeros(SPACE), "labels": np.zeros(SPACE)}], **options)


def test_options_of_augmentations() -> None:
    for make in (lambda: Flip((0,), 2), lambda: Intensity((1, 0)), lambda: Intensity(noise=-1)):
        with refused("give"):
            make()
    with refused("there are no samples"):
        Volumes(StandIn(), [])
    with refused("epoch -1 does not exist"):
        Volumes(StandIn(), [{"volume": np.zeros(SPACE)}]).set_epoch(-1)


# --- ranks that differ -----------------------------------------------------------------------------


class Group:
    """Ranks as threads, whose gathers meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.values: list[Any] = [None] * size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(20)
        found = list(self.values)
        self.barrier.wait(20)
        return found

    def run(self, work: Callable[[int, StandIn], None]) -> list[str]:
        """What every rank raises."""
        said = [""] * self.size
        modules = ranks([(0, 2), range(0, self.size + 1), (0, 7), (0, 5)],
                        StandIn(whole={"volume": (2, 1, self.size, 7, 5), "logits": (2, 3, self.size, 7, 5)}))

        def one(rank: int) -> None:
            module = StandIn(modules[rank].boxes, modules[rank].whole, gatherer=lambda v: self.gather(rank, v))
            try:
                work(rank, module)
            except (PartitionError, ExecutionError) as error:
                said[rank] = f"{type(error).__name__}: {error}"

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        return said


@pytest.fixture
def files(tmp_path: Path) -> list[dict[str, Any]]:
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.full((3, 7, 5), i, np.float32))
    return [{"volume": tmp_path / f"{i}.npy"} for i in range(4)]


def take(volumes: Volumes, epoch: int = 0, steps: int = 99) -> None:
    volumes.set_epoch(epoch)
    for _ in itertools.islice(volumes, steps):
        pass


def test_ranks_that_agree(files: list[dict[str, Any]], tmp_path: Path) -> None:
    """The same files below another folder are the same."""
    moved = [{"volume": tmp_path / "elsewhere" / sample["volume"].name} for sample in files]
    (tmp_path / "elsewhere").mkdir()
    for before, after in zip(files, moved, strict=True):
        after["volume"].write_bytes(before["volume"].read_bytes())
    assert Group(3).run(lambda rank, module: take(Volumes(module, moved if rank else files, AUGMENT))) == [""] * 3


DIFFERENT: dict[str, tuple[Callable[[int, StandIn, list[dict[str, Any]]], None], str]] = {
    "order": (lambda r, m, f: take(Volumes(m, f[::-1] if r == 1 else f)),
              "AgreedError: the samples: rank 1 differs from rank 0; .*sort the list"),
    "count": (lambda r, m, f: take(Volumes(m, f[:3] if r else f)),
              "AgreedError: the samples: ranks 1, 2 differ from rank 0; .*"),
    "contents of arrays": (lambda r, m, f: take(Volumes(m, [{"volume": np.full((3, 7, 5), r // 2)}])),
                           "AgreedError: the samples: rank 2 differs from rank 0; .*"),
    "seed": (lambda r, m, f: take(Volumes(m, f, seed=r // 2)),
             "AgreedError: the settings .*: rank 2 differs from rank 0; give every rank the same"),
    "augment": (lambda r, m, f: take(Volumes(m, f, [Flip((0,), 0.4 if r == 1 else 0.5)])),
                "AgreedError: the settings .*: rank 1 differs from rank 0; give every rank the same"),
    "epoch": (lambda r, m, f: take(Volumes(m, f), epoch=r % 2),
              "AgreedError: the epoch of the data: rank 1 differs from rank 0; call set_epoch .*"),
    "a file that one rank does not see": (
        lambda r, m, f: take(Volumes(m, f if r != 2 else [*f[:3], {"volume": "gone.npy"}])),
        r"AgreedError: rank 2: gone\.npy: no such file; check the path"),
    "an option that is wrong on one rank": (lambda r, m, f: take(Volumes(m, f, [Flip((9 if r else 0,))])),
                                            "AgreedError: rank 1: Flip: there is no spatial axis 9; .*"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_differ_all_refuse(case: str, files: list[dict[str, Any]]) -> None:
    work, pattern = DIFFERENT[case]
    said = Group(3).run(lambda rank, module: work(rank, module, files))
    assert len(set(said)) == 1
    with refused(rf"\A{pattern}\Z"):
        raise PartitionError(said[0])


def test_a_step_that_one_rank_repeats(files: list[dict[str, Any]]) -> None:
    def work(rank: int, module: StandIn) -> None:
        volumes = Volumes(module, files)
        iterator = iter(volumes)
        next(iterator)
        next(iter(volumes) if rank == 1 else iterator)

    assert Group(3).run(work) == ["AgreedError: the step of the data: rank 1 differs from rank 0; let every rank take "
                                  "all steps of an epoch"] * 3


def test_a_read_that_fails_on_one_rank_is_told_on_all(files: list[dict[str, Any]],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    original = data.read_part

    def failing(error: Exception) -> Callable[..., Any]:
        def read(stored: Any, slot: Any, *rest: Any) -> Any:
            if slot.box.axes[2] == span(1, 2) and stored.where.endswith("3.npy"):
                raise error
            return original(stored, slot, *rest)

        return read

    for error, expected in ((PartitionError("3.npy: damaged; copy it again"),
                             "AgreedError: rank 1: 3.npy: damaged; copy it again"),
                            (MemoryError("no room"),
                             "ExecutionError: reading the data failed: rank 1: MemoryError: no room")):
        monkeypatch.setattr(data, "read_part", failing(error))
        assert Group(3).run(lambda rank, module: take(Volumes(module, files))) == [expected] * 3


def test_labels_with_fractions() -> None:
    volumes = Volumes(StandIn(), [{"volume": np.zeros(SPACE), "labels": np.full(SPACE, 0.5)}])
    with refused("sample 0: its labels are no whole numbers"):
        list(volumes)
    whole = Volumes(StandIn(), [{"volume": np.zeros(SPACE), "labels": np.full(SPACE, 2.0)}])
    assert next(iter(whole))["labels"].unique().tolist() == [2]


def test_an_epoch_may_be_left_early(files: list[dict[str, Any]]) -> None:
    before = threading.active_count()
    for _ in Volumes(StandIn(whole={"volume": (1, 1, 3, 7, 5), "y": (1, 1, 3, 7, 5)}), files):
        break
    assert threading.active_count() == before


def test_with_a_module(tmp_path: Path) -> None:
    """A step of training from files, all ranks in this process."""
    network = nn.Conv3d(1, 3, 3, padding=1)
    plan = pt.partition(network, torch.zeros(2, 1, *SPACE), mesh="depth=2")
    module = plan.module()
    (name,) = module.input_names
    samples = [{name: np.random.default_rng(i).random(SPACE), "labels": np.full(SPACE, i)} for i in range(3)]
    for part in pt.data.Volumes(module, samples, [pt.data.Flip((0,)), pt.data.Intensity()]):
        pt.losses.cross_entropy(module, module(part[name]), part["labels"]).backward()
    assert all(p.grad is not None for p in module.parameters())
