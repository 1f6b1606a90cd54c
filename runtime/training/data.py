"""Data for training: every rank reads its own part of every volume, in an order that all ranks have verified.

    data = pt.data.Volumes(module, [{"volume": "ct1.npy", "labels": "seg1.npy"}, ...], [pt.data.Flip((0, 1, 2))])
    for epoch in range(100):
        data.set_epoch(epoch)
        for part in data:
            loss = pt.losses.cross_entropy(module, module(part["volume"]), part["labels"])

One step takes as many cases as the plan's batch has, per copy of the network; a rank of a batch mesh axis reads its own
cases only.  The next step is read while this one is computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from partitioner.errors import AgreedError, ExecutionError, PartitionError
from partitioner.geometry import Box
from runtime.training.augment import Augmentation, Crop, Draw, Flip, Intensity, draw, flipped_axes, generator
from runtime.training.cases import (
    Slot,
    Stored,
    Volume,
    common_folder,
    describe_unlike,
    look_at,
    offsets,
    part_extents,
    read_part,
)

__all__ = ["Augmentation", "Crop", "Flip", "Intensity", "Volumes"]

_LISTED = 20
"""Problems told at once."""


class Partition(Protocol):
    """What the data need to know of a module: `PartitionedModule` is one."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        ...

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs."""
        ...

    @property
    def is_distributed(self) -> bool:
        """Whether there are other processes."""
        ...

    @property
    def replica(self) -> int:
        """This process's copy of the network."""
        ...

    @property
    def replicas(self) -> int:
        """Copies of the network."""
        ...

    def extents(self, name: str) -> tuple[int, ...]:
        """Extents of a whole input or output."""
        ...

    def own_box(self, name: str) -> Box:
        """This process's part of an input or output."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """A value of every process."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights."""
        ...


@dataclass(frozen=True)
class _Fact:
    """Something that all ranks must have alike."""

    what: str
    value: str
    remedy: str


class Volumes:
    """The steps of an epoch, each a dict of this process's parts: name -> tensor.

    A file holds one case: (space), (channels, space) or (1, channels, space).  Names of the module's inputs are cut as
    these are; other names (labels, masks, targets) as an output is.  Files that are larger than the plan give their
    middle, or a random place with `Crop`.  Values come in the type of the module's weights, as (batch, channels,
    space); labels as int64, without an axis for one channel.  Where the cases do not fill the last step, the first
    ones of the order come again.

    Compressed files (.nii.gz, compressed .npz) are read from their start by every rank.

    Args:
        module: of a plan.
        samples: per case the file or array of every name; the same list on every rank.
        augment: what is done to each case, in this order, but for crops and flips, which come first.
        seed: with the epoch, decides order and augmentations.
        shuffle: whether each epoch has an order of its own.
        labels: names whose values are class numbers.
        output: the output beside which names that are no inputs are cut; may be left out where there is one.

    Raises:
        PartitionError: on every rank, with all that is wrong with the samples of any, or how ranks differ.
    """

    def __init__(self, module: Partition, samples: Sequence[Mapping[str, Volume]],
                 augment: Sequence[Augmentation] = (), seed: int = 0, shuffle: bool = True,
                 labels: str | Sequence[str] = "labels", output: str | None = None) -> None:
        self.epoch = 0
        self._module = module
        self._augment = tuple(augment)
        self._seed = seed
        self._shuffle = shuffle
        self._labels = (labels,) if isinstance(labels, str) else tuple(labels)
        wide = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        self._dtype = wide
        self._read_dtype = np.dtype(np.float64 if wide == torch.float64 else np.float32)
        problems = self._check_options()
        self._slots: dict[str, Slot] = {}
        self._cases: list[dict[str, Stored]] = []
        if not problems:
            problems = self._make_slots(samples, output)
        if not problems:
            problems = self._look(samples)
        _refuse(module, problems)
        self._batch = next(iter(self._slots.values())).extents[0]
        settings = repr((seed, shuffle, self._augment, sorted(self._labels), output))
        _compare(module, (
            _Fact("the settings of the data (seed, shuffle, augment, labels, output)", settings,
                  "give every rank the same"),
            _Fact("the samples", _digest(_identity(case) for case in self._cases),
                  "give every rank the same files in the same order: sort the list"),
        ))

    def set_epoch(self, epoch: int) -> None:
        """Choose order and augmentations of the next pass over the samples; the same number on every rank.

        Raises:
            PartitionError: for a negative number.
        """
        if epoch < 0:
            raise PartitionError(f"epoch {epoch} does not exist; count from 0")
        self.epoch = epoch

    def __len__(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self._cases) / (self._batch * self._module.replicas))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """The steps of the epoch; all ranks take them together.

        Raises:
            PartitionError: on every rank, when a file is damaged or gone on one, or ranks are at different steps.
            ExecutionError: on every rank, when reading fails otherwise on one.
        """
        epoch, steps = self.epoch, len(self)
        order = self._order(epoch)
        with ThreadPoolExecutor(1, "data") as pool:
            ahead = pool.submit(self._load, epoch, order, 0)
            for step in range(steps):
                self._agree(epoch, order, step, ahead)
                part = ahead.result()
                if step + 1 < steps:
                    ahead = pool.submit(self._load, epoch, order, step + 1)
                yield part

    # --- what is to be read ----------------------------------------------------------------------------

    def _check_options(self) -> list[str]:
        problems: list[str] = []
        if self._seed < 0:
            problems.append(f"seed {self._seed} is negative; give 0 or more")
        if sum(isinstance(step, Crop) for step in self._augment) > 1:
            problems.append("augment has several Crop; one crop is made of a case, so give one")
        axes = len(self._module.extents(self._module.input_names[0])) - 2
        for step in self._augment:
            try:
                if isinstance(step, Flip):
                    flipped_axes(step, axes)
            except PartitionError as error:
                problems.append(str(error))
        return problems

    def _make_slots(self, samples: Sequence[Mapping[str, Volume]], output: str | None) -> list[str]:
        """Where each name goes; inputs first."""
        module = self._module
        if not samples:
            return ["there are no samples; check where the files are looked for"]
        others = [name for name in samples[0] if name not in module.input_names]
        beside = output or module.output_names[0]
        if output is not None and output not in module.output_names:
            return [f"the module has no output '{output}'; it has {', '.join(module.output_names)}"]
        if others and output is None and len(module.output_names) > 1:
            return [f"{', '.join(others)}: the module has the outputs {', '.join(module.output_names)}; say by "
                    "output= which of them these are compared with"]
        for name in (*module.input_names, *others):
            number = module.input_names.index(name) if name in module.input_names else None
            of = beside if number is None else name
            self._slots[name] = Slot(name, module.extents(of), module.own_box(of), number, name in self._labels)
        problems = [f"'{s.name}' would have extents {s.extents}, without batch and channels; the data know batch, "
                    "channels, space" for s in self._slots.values() if len(s.extents) < 2]
        batches = {s.extents[0] for s in self._slots.values()}
        return problems or ([] if len(batches) == 1 else
                            [f"inputs and outputs have different batches ({', '.join(map(str, sorted(batches)))}); "
                             "give the data by a loader of your own"])

    def _look(self, samples: Sequence[Mapping[str, Volume]]) -> list[str]:
        """Read all headers; what is wrong with them."""
        problems: list[str] = []
        root = common_folder([volume for sample in samples for volume in sample.values()])
        for number, sample in enumerate(samples):
            names = [*(f"no {n}" for n in self._slots if n not in sample),
                     *(f"also {n}" for n in sample if n not in self._slots)]
            if names:
                problems.append(f"sample {number} has {', '.join(names)}; give {', '.join(self._slots)}")
                continue
            case: dict[str, Stored] = {}
            for name, slot in self._slots.items():
                try:
                    case[name] = look_at(sample[name], slot, number, root, self._read_dtype)
                except (PartitionError, OSError) as error:
                    problems.append(str(error))
            if len(case) == len(self._slots):
                problems.extend(describe_unlike(self._pairs(case), self._cases[0] if self._cases else case))
                self._cases.append(case)
        return problems

    def _pairs(self, case: Mapping[str, Stored]) -> list[tuple[Stored, Slot]]:
        return [(case[name], slot) for name, slot in self._slots.items()]

    # --- steps -----------------------------------------------------------------------------------------

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._cases)))
        return generator(self._seed, epoch).permutation(len(self._cases)).tolist()

    def _case(self, epoch: int, order: Sequence[int], place: int) -> tuple[dict[str, Stored], Draw]:
        """The case at a place of an epoch's order, and what happens to it there."""
        axes = len(next(iter(self._slots.values())).space)
        return self._cases[order[place % len(order)]], draw(self._augment, generator(self._seed, epoch, place), axes)

    def _load(self, epoch: int, order: Sequence[int], step: int) -> dict[str, torch.Tensor]:
        """This process's parts of a step; runs beside the training."""
        first = (step * self._module.replicas + self._module.replica) * self._batch
        found: dict[str, torch.Tensor] = {}
        for number, (name, slot) in enumerate(self._slots.items()):
            parts: list[torch.Tensor] = []
            for place in slot.cases:
                case, what = self._case(epoch, order, first + place)
                if not slot.box:
                    parts.append(torch.zeros(part_extents(case[name], slot)))
                    continue
                begin = offsets(self._pairs(case), what)[number]
                parts.append(read_part(case[name], slot, what, begin, self._read_dtype))
            dtype = torch.int64 if slot.is_labels else self._dtype
            empty = (0, *part_extents(self._cases[0][name], slot))
            found[name] = torch.stack(parts).to(dtype) if parts else torch.zeros(empty, dtype=dtype)
        return found

    def _agree(self, epoch: int, order: Sequence[int], step: int, ahead: Future[Any]) -> None:
        """Make sure that all ranks have read their part of the same step."""
        error = ahead.exception()
        size = self._batch * self._module.replicas
        cases = [self._case(epoch, order, place) for place in range(step * size, (step + 1) * size)]
        text = error and (str(error) if isinstance(error, PartitionError) else f"{type(error).__name__}: {error}")
        _compare(self._module, (
            _Fact("the epoch of the data", str(epoch), "call set_epoch with the same number on every rank"),
            _Fact("the step of the data", str(step), "let every rank take all steps of an epoch"),
            _Fact("the samples of this step", _digest(f"{_identity(case)} {what}" for case, what in cases),
                  "run the same version of numpy everywhere"),
        ), text, isinstance(error, PartitionError | None), error)


def _compare(module: Partition, facts: Sequence[_Fact], problem: str | None = None, is_mistake: bool = True,
             error: BaseException | None = None) -> None:
    """Let all ranks have the same facts and no problem, or raise on all of them.

    Args:
        is_mistake: whether the problem is one that the user can mend.
    """
    own = [(fact.what, fact.value) for fact in facts]
    found = module.gather((own, problem, is_mistake))
    told = [(rank, text, mend) for rank, (_, text, mend) in enumerate(found) if text is not None]
    if told:
        text = "\n".join(_merged([[text] if text else [] for _, text, _ in found]))
        if not all(mend for _, _, mend in told):
            raise ExecutionError(f"reading the data failed: {text}") from error
        raise _mistake(module, text) from error
    if any([what for what, _ in other] != [fact.what for fact in facts] for other, _, _ in found):
        raise _mistake(module, "the ranks do not use the data at the same point of their work; make and iterate them "
                               "in the same order on every rank")
    for i, fact in enumerate(facts):
        others = [rank for rank, (other, _, _) in enumerate(found) if other[i] != found[0][0][i]]
        if others:
            listed = ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")
            raise _mistake(module, f"{fact.what}: rank{'s' if len(others) > 1 else ''} {listed} "
                                   f"differ{'' if len(others) > 1 else 's'} from rank 0; {fact.remedy}")


def _refuse(module: Partition, problems: Sequence[str]) -> None:
    """Raise on every rank when one has problems."""
    found = _merged(module.gather(list(problems)))
    if found:
        rest = len(found) - _LISTED
        raise _mistake(module, "\n".join([*found[:_LISTED], *([f"and {rest} more"] if rest > 0 else [])]))


def _merged(problems: Sequence[Sequence[str]]) -> list[str]:
    """The problems of all ranks, each once; those that not every rank has with the rank that has them first."""
    found: dict[str, list[int]] = {}
    for rank, own in enumerate(problems):
        for text in own:
            found.setdefault(text, []).append(rank)
    return [text if len(ranks) == len(problems) else f"rank {ranks[0]}: {text}" for text, ranks in found.items()]


def _mistake(module: Partition, text: str) -> PartitionError:
    return AgreedError(text) if module.is_distributed else PartitionError(text)


def _identity(case: Mapping[str, Stored]) -> str:
    return "; ".join(f"{name}={stored.identity}" for name, stored in case.items())


def _digest(texts: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
