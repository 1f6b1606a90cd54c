"""The Python API: partition a model, look at the plan, run it.  The only place where compiling and running meet."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import onnx_ir as ir

from partitioner import dialect
from partitioner.axes import named_axes
from partitioner.compiler import Purpose, Steering, plain_model, prepare
from partitioner.compose import Around, Wrapping, compose
from partitioner.cost import PlanCost, plan_cost
from partitioner.errors import PartitionError, refuse_all
from partitioner.guards import (
    Arrays,
    MeshLike,
    check_inputs,
    checked_path,
    chosen_names,
    is_tensor,
    source_problems,
    whole_numbers,
)
from partitioner.loader import load_file, load_model, save_model
from partitioner.mesh import Mesh
from partitioner.ops.weights import without_gradient
from partitioner.planning import Devices, Request, compile_request, devices_of, pinned_axes, search_plan
from partitioner.report import plan_dict, render, to_text
from partitioner.sessions import Backend, Progress, Session

if TYPE_CHECKING:
    from partitioner.page import Alternative
    from partitioner.planner.choice import Choice
    from partitioner.profile import Link, Profile
    from partitioner.timing import PlanTime
    from partitioner.training_cost import Optimiser, TrainingCost
    from partitioner.training_report import TrainingReport
    from partitioner.training_time import TrainingTime
    from runtime.training.module import PartitionedModule

FOLDED = ("the batch norms of this model look folded into {count} convolutions ({names}, ...), so that they cannot "
          "train; export it from torch with pt.partition(module, example, train=True), or with "
          "torch.onnx.export(module.eval(), ..., optimize=False)")


def partition(  # noqa: PLR0913 (the words of the command)
    model: Any,
    example: Any = None,
    *,
    mesh: MeshLike = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    cuts: Mapping[str, Sequence[int]] | None = None,
    dump_dir: str | Path | None = None,
    strict: bool = False,
    train: bool | str = False,
    memory: str | int | None = None,
    host_memory: str | int | None = None,
    devices: int | None = None,
    profile: Profile | str | Path | None = None,
    backend: str | None = None,
    pinned: Mapping[str, str | Sequence[str]] | None = None,
    overlap: bool | Collection[str] = False,
    deepen: bool | Collection[str] = False,
    slabs: bool = True,
    **around: Unpack[Around],
) -> Plan:
    """Partition a model over a mesh of ranks: the one given, or the one that is best for so many devices.

    Args:
        model: path of an .onnx file, `onnx.ModelProto`, `onnx_ir.Model`, or `torch.nn.Module`.
        example: for a torch module, one input tensor or a tuple of them; exported by torch.onnx in eval mode.
        mesh: `"depth=2,height=2"`, `{"depth": 2}`, `"2x2x1"` (the spatial axes in order) or a `Mesh`.
        shapes: extents per input; needed where the file leaves axes open.
        cuts: where shards begin, by mesh axis: `{"depth": (0, 50, 121)}`; even shards otherwise.
        dump_dir: folder for a numbered ONNX file after every pass.
        strict: refuse operators without a sharded rule, which otherwise run replicated on gathered inputs.
        train: export a torch module so that `Plan.module` can train it: batch norms and dropouts stay.  With `devices`
            the plan is chosen for training steps: their time and memory, with the state of an optimiser: `"adam"`
            (also for True), `"momentum"`, `"sgd"` or `"none"`.
        memory: what the process may hold, as `"2GiB"` or in bytes: anonymous memory, with the program itself, weights
            and whole inputs and outputs.  The plan is executed depth-first where that needs less.
            With `devices` it is what each of them has.
        host_memory: of that, what tensors may take that rest between chains; beyond it they lie in mapped files in the
            folder for temporary files.
        devices: how many there are; the planner chooses the mesh, the cuts and more, as far as `mesh`, `cuts` and
            `pinned` leave it to it.  See `Plan.choice` and `Plan.explain`.
        profile: what each device can do; see `Plan.time`.
        backend: how messages travel between them; by default what suits the profile.
        pinned: nodes that all ranks compute, by name: `{"conv7": "replicated"}`, or the mesh axes of those ranks.
        overlap: let halos travel while what needs none is computed: names of halo exchanges, or True for all that can.
        deepen: let ranks compute halos themselves, so that several layers share one deeper exchange: names of the
            values that need none of their own then, or True for all for which that can be done.
        slabs: whether a rank may go through its shard slab by slab, where that is faster or the memory asks for it.
            With False every step takes a whole shard.
        around: what becomes part of the graph before it is partitioned: `preprocess=["window=-160:240"]`,
            `output_ops=["softmax", "argmax"]`, `tta="flips"`, `ensemble=["fold1.onnx"]`; words as in the command.

    Raises:
        PartitionError: when the model cannot be read or cannot be kept exact; every reason is listed.
    """
    trains = train is not False
    if isinstance(train, str):
        from partitioner.training_cost import known_optimiser

        known_optimiser(train)
    if trains and devices is None and example is None and not _is_module(model):
        raise PartitionError("train=True exports a torch module with an example input, or chooses a mesh for training "
                             "with devices; a model in a file trains as it is: pt.partition(model, ...).module()")
    source, found = source_of(model, example, trains)
    wrapping = Wrapping.of(around, lambda other: source_of(other, example if _is_module(other) else None, trains)[0])
    if wrapping:
        refuse_all(source_problems(source))
        source = compose(source, wrapping)
        open_inputs = {str(v.name) for v in source.graph.inputs if v.shape is None or not v.shape.is_static()}
        found = {name: shape for name, shape in found.items() if name in open_inputs}
    wanted = {**found, **whole_numbers(shapes, "shapes", "{'volume': (1, 1, 121, 160, 143)}")}
    positions = whole_numbers(cuts, "cuts", "{'depth': (0, 50, 121)}")
    steering = Steering(pinned_axes(pinned), chosen_names("deepen", deepen, "values"),
                        chosen_names("overlap", overlap, "halo exchanges"))
    request = Request(mesh, wanted, positions, strict, None, steering, slabs)
    folder = None if dump_dir is None else Path(dump_dir)
    if devices is not None:
        return Plan.search(source, request, devices_of(devices, profile, backend, memory, host_memory, train), folder)
    refuse_all([f"{word} is for choosing a mesh; give devices too, as devices=8"
                for word, given in (("profile", profile), ("backend", backend)) if given is not None])
    if memory is not None or host_memory is not None:
        from partitioner.budget import Budget

        request = replace(request, budget=Budget.of(memory, host_memory))
    return Plan.compile(source, request, folder)


def load(path: str | Path) -> Plan:
    """Read a plan that `Plan.save` or `partition compile` has written.

    Raises:
        PartitionError: when the file is no plan, is damaged, or is of another version.
    """
    from partitioner.damage import check_plan

    model = load_file(checked_path(path))
    check_plan(model, str(path))
    return Plan(model)


def source_of(model: Any, example: Any, train: bool) -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
    """A model that a user gives in any form, and the extents of its inputs where an example tells them."""
    if example is not None or _is_module(model):
        from partitioner.exporter import export_module

        return export_module(model, example, train)
    return load_model(model), {}


def _is_module(model: Any) -> bool:
    return any(c.__module__ == "torch.nn.modules.module" for c in type(model).__mro__)


class Plan:
    """A partitioned model, all ranks: an ONNX graph with explicit communication.

    Attributes:
        model: the graph; one node stands for all its shards.
        choice: what the planner looked at, where it chose; None otherwise.
    """

    def __init__(self, model: ir.Model, source: ir.Model | None = None, request: Request | None = None,
                 choice: Choice | None = None) -> None:
        self.model = model
        self.choice = choice
        self._source = source
        self._request = request or Request()

    @classmethod
    def compile(cls, source: ir.Model, request: Request, dump_dir: Path | None = None) -> Plan:
        """Run the standard passes on a copy of a model; see `partition`."""
        return cls(compile_request(source, request, dump_dir), source, request)

    @classmethod
    def search(cls, source: ir.Model, request: Request, devices: Devices, dump_dir: Path | None = None,
               progress: Progress | None = None) -> Plan:
        """The plan that the planner chooses for some devices; see `partition`."""
        model, found, choice = search_plan(source, request, devices, dump_dir, progress)
        return cls(model, source, found, choice)

    def __repr__(self) -> str:
        return f"<Plan for {_shapes_text(self.input_shapes)} on {self.mesh}>"

    @property
    def mesh(self) -> Mesh:
        """The mesh of ranks."""
        return dialect.get_mesh(self.model)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Extents per input."""
        return {str(v.name): dialect.shape_of(v) for v in self.model.graph.inputs}

    @cached_property
    def cost(self) -> PlanCost:
        """Memory, bytes, messages and operations per rank, forecast from the layouts."""
        found = plan_cost(self.model)
        if dialect.get_schedule(self.model) is None:
            return found
        from partitioner.budget import with_slab_peaks

        return with_slab_peaks(self.model, found)

    def time(self, profile: Profile | str | Path | None = None, backend: str = "lockstep",
             threads: int | None = None, link: Link | None = None) -> PlanTime:
        """How long a run takes, step by step and rank by rank, forecast from the layouts and a machine's figures.

        Args:
            profile: a profile, its file, or the name of a shipped one; by default that of this machine.
            backend: `lockstep`, `gloo`, or another transport that the profile knows.
            threads: CPU threads per process; by default the most that the profile knows, shared out over gloo's ranks.
            link: a slower network; see `session`.

        Raises:
            PartitionError: when the profile cannot be read, or does not know the transport.
        """
        from partitioner.profile import Profile
        from partitioner.timing import plan_time

        found = profile if isinstance(profile, Profile) else Profile.find(profile)
        return plan_time(self.model, self.cost, found, backend, threads, link)

    def explain(self, node: str | None = None) -> str:
        """Why the planner chose this plan, or what it decided at one node and what that costs in the other plans.

        Raises:
            PartitionError: when the planner did not choose it (it does with `devices`), or there is no such node.
        """
        if self.choice is None:
            raise PartitionError("this plan was not chosen among others; give devices, as devices=8")
        from partitioner.planner.explain import explain_node, why

        return why(self.choice) if node is None else explain_node(self.choice, node)

    def report(self, width: int = 160) -> str:
        """The plan as a table of text, `width` columns wide."""
        return to_text(render(self.model, self.cost), width)

    def report_html(self, path: str | Path, name: str = "", alternatives: Sequence[Alternative] = (),
                    explain: str = "") -> None:
        """Write the plan as one HTML page to look at; see `partitioner.page.page_data` for the arguments.

        Raises:
            PartitionError: when the path cannot be written, or an alternative is not understood.
        """
        from partitioner.page import write_page

        if self.choice is not None:
            from partitioner.planner.explain import alternatives_of

            alternatives, explain = alternatives or alternatives_of(self.choice), explain or self.explain()
        write_page(checked_path(path), self.model, self.cost, name, alternatives, explain)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data (see `partitioner.report.plan_dict`), with the planner's choice where there is one."""
        found = plan_dict(self.model, self.cost)
        if self.choice is None:
            return found
        from partitioner.planner.explain import choice_dict

        return {**found, "choice": choice_dict(self.choice)}

    def to_text(self) -> str:
        """The printed form: one line per node."""
        from partitioner.printer import print_plan

        return print_plan(self.model)

    def expand(self) -> ir.Model:
        """One plain ONNX graph in which every device has its own nodes (up to 64 devices).

        Raises:
            PartitionError: for more devices.
        """
        from passes.expand import expand

        return expand(self.model)

    def save(self, path: str | Path) -> None:
        """Write the plan as an ONNX file, weights included.

        Raises:
            PartitionError: when the path cannot be written.
        """
        save_model(self.model.clone(), checked_path(path))

    def run(self, inputs: Arrays, out: Arrays | None = None) -> dict[str, Any]:
        """Run all shards in this process, on CPU or where the first torch input lies.

        Args:
            inputs: numpy arrays or torch tensors per input name.
            out: arrays that outputs are written to, by name (see `Session.run`).

        Returns:
            outputs per name, numpy or torch as the first input is.

        Raises:
            PartitionError: for a missing or unknown input, a wrong shape or type.
        """
        check_inputs(self.model, inputs)
        device = next((str(v.device) for v in inputs.values() if is_tensor(v)), "cpu")
        with self.session(backend="lockstep", device=device) as session:
            return session.run(inputs, out=out)

    def session(self, backend: Backend = "lockstep", device: str = "cpu", threads: int | None = None,
                link: Link | None = None) -> Session:
        """The plan made ready for several runs; use it in a `with` block.

        Args:
            backend: `lockstep` (all shards in this process), or one process per rank: `gloo`, `nccl`, or `shm` (over
                this host's shared memory).
            device: `cpu`, `cuda`, or a list for the ranks in turn: `cuda:0,cuda:1`.
            threads: CPU threads per process; shared out evenly by default.
            link: emulates a slower network for backend `gloo`: with `pt.Link(latency=0.002, bandwidth=1e9)` no message
                arrives earlier than 2 ms and its bytes / 1e9 seconds after it was posted.

        Raises:
            PartitionError: when the device or backend does not exist here, or the link cannot be emulated.
            ExecutionError: when the ranks cannot be started.
        """
        return Session(self, backend, device, threads, link)

    def with_shapes(self, shapes: Mapping[str, Sequence[int]]) -> Plan:
        """The same partition of the same model for other extents; axes of the same extent keep their cuts.

        Raises:
            PartitionError: when the plan came from a file, or the network cannot take these extents.
        """
        if self._source is None:
            raise PartitionError(
                f"this plan is for inputs {_shapes_text(self.input_shapes)}, not {_shapes_text(shapes)}; "
                "partition the model again for other extents")
        shapes = whole_numbers(shapes, "shapes", "{'volume': (1, 1, 121, 160, 143)}")
        after = {**self.input_shapes, **shapes}
        changed = {axis for name, axes in named_axes(self.model).items() for axis, place in axes.items()
                   if self.input_shapes[name][place : place + 1] != after[name][place : place + 1]}
        kept = {axis: cuts for axis, cuts in self._request.cuts.items() if axis not in changed}
        return Plan.compile(self._source, replace(self._request, mesh=self.mesh, shapes=shapes, cuts=kept))

    def module(self, device: str = "cpu", *, checkpoint: bool | None = None, biased_variance: bool = False,
               global_statistics: bool = False, backend: str | None = None) -> PartitionedModule:
        """The plan as a `torch.nn.Module`, to be trained.

        With all shards in this process, or as this rank's part where torch.distributed has been initialised.  Then
        there is a process for every rank of the mesh, or a multiple: several copies of the network, each of which
        trains on samples of its own; their gradients are averaged.

        Args:
            device: `cpu`, `cuda`, or a list for the ranks in turn.
            checkpoint: keep few activations and compute the others, halos included, again in the backward pass; by
                default where the planner chose so, for the memory (with `devices` and `train`).
            biased_variance: update running variances with the population's, as ONNX does, not torch's unbiased ones.
            global_statistics: take batch statistics over all copies of the network, not over each by itself.
            backend: how shards' messages go between processes: by the process group (`gloo`, `nccl`) or by shared
                memory (`shm`); by default by shared memory where all of a mesh are on one host and compute on the CPU.

        Raises:
            PartitionError: when the plan came from a file, the processes are no multiple of the ranks or have
                different plans, an operator between a weight and an output has no gradient, or messages cannot go
                by that backend.
        """
        from partitioner.exporter import folded_norms
        from runtime.training.build import build_module
        from runtime.training.module import Network, Options

        source = self._trainable
        folded = folded_norms(source)
        if folded:
            warnings.warn(FOLDED.format(count=len(folded), names=", ".join(folded[:3])), stacklevel=2)
        training, evaluation = self._compiled("training"), self._compiled("evaluation")
        refuse_all(without_gradient(training))
        if checkpoint is None:
            step = None if self.choice is None else self.choice.chosen.step
            checkpoint = step is not None and step.checkpoint
        options = Options(biased_variance, checkpoint, global_statistics)
        return build_module(Network(source, training, evaluation), device, options, backend)

    def training_cost(self, checkpoint: bool = False, optimiser: Optimiser = "adam") -> TrainingCost:
        """Memory, bytes, messages and operations of a training step per rank, forecast from the layouts.

        Args:
            checkpoint: as in `module`.
            optimiser: `none`, `sgd`, `momentum` or `adam`: what keeps state beside the parameters.

        Raises:
            PartitionError: when the plan came from a file, or the optimiser is unknown.
        """
        from partitioner.training_cost import training_cost

        return training_cost(self._training, checkpoint, optimiser)

    def training_time(self, profile: Profile | str | Path | None = None, backend: str = "lockstep",
                      threads: int | None = None, checkpoint: bool = False) -> TrainingTime:
        """How long a training step takes on every rank, estimated; see `partitioner.training_time` for how roughly.

        Args:
            profile, backend, threads: as in `time`.
            checkpoint: as in `module`.

        Raises:
            PartitionError: when the plan came from a file, or the profile cannot be read or lacks the transport.
        """
        from partitioner.profile import Profile
        from partitioner.timing import plan_time
        from partitioner.training_time import training_time

        found = profile if isinstance(profile, Profile) else Profile.find(profile)
        run = plan_time(self._training, plan_cost(self._training), found, backend, threads)
        return training_time(run, self.training_cost(checkpoint), found)

    def training_report(self, optimiser: Optimiser = "adam", profile: Profile | str | Path | None = None,
                        backend: str = "lockstep") -> TrainingReport:
        """What a training step takes on the rank that takes most, with all activations kept and with few.

        Args:
            optimiser: as in `training_cost`.
            profile, backend: as in `time`.

        Returns:
            rows; `render()` for a table, `to_dict()` for programs.

        Raises:
            PartitionError: as `training_cost` and `training_time`.
        """
        from partitioner.profile import Profile
        from partitioner.training_report import training_report

        found = profile if isinstance(profile, Profile) else Profile.find(profile)
        return training_report(self._training, optimiser, found, backend)

    @property
    def _trainable(self) -> ir.Model:
        """The model that trains.

        Raises:
            PartitionError: when the plan came from a file.
        """
        if self._source is None:
            raise PartitionError("a plan from a file has its weights folded for inference; train the model: "
                                 "pt.partition(model, ...).module()")
        return self._source

    @cached_property
    def _training(self) -> ir.Model:
        """The plan of the network as it trains."""
        return self._compiled("training")

    def _compiled(self, purpose: Purpose) -> ir.Model:
        """The plan of the network with its weights as they are; what is pinned stays so where the node is there."""
        prepared = prepare(self._trainable, self.input_shapes, self._request.strict, purpose)
        names = {str(node.name) for node in prepared.model.graph}
        pinned = {name: axes for name, axes in self._request.steering.pinned.items() if name in names}
        return prepared.lay_out(self.mesh, self._request.cuts, steering=Steering(pinned))

    def unpartitioned(self) -> ir.Model:
        """The plain model that the plan was made from, or its equal when the plan came from a file."""
        return plain_model(self.model) if self._source is None else self._source.clone()


def _shapes_text(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in shapes.items())
