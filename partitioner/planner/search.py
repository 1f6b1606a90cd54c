"""The search: meshes by branch and bound, then for the best of them cuts, replicated layers and deeper halos.

    all meshes ---estimate---> in order ---lay out, forecast---> the best few ---steer---> the chosen one
                    (one pass)     stops where the estimate is above the best forecast
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.budget import Budget, memory_text
from partitioner.compiler import DepthFirst
from partitioner.cost import PlanCost, plan_cost
from partitioner.curves import FloatArray
from partitioner.errors import BudgetError, PartitionError
from partitioner.garbage import kept_for_later
from partitioner.interior import can_overlap
from partitioner.layout import Cuts, even_cuts
from partitioner.mesh import AXIS_NAMES, Mesh
from partitioner.planner.choice import Choice, Form, Goal, Rejected, TrainingStep, Way
from partitioner.planner.cuts import aligned_cuts, balanced_cuts, extents_of, strides_of
from partitioner.planner.estimate import Estimates
from partitioner.planner.explain import mesh_text
from partitioner.planner.meshes import meshes_of
from partitioner.planner.replicate import Stretches, seconds_by_node, subsets
from partitioner.report import seconds_text
from partitioner.rolling import SMALL
from partitioner.schedules import THINNEST_SLAB, Candidate, fastest, fit
from partitioner.strips import CutPoints, Prices
from partitioner.timing import PlanTime, plan_time, threads_of_rank
from partitioner.training_cost import WORDS, parameter_bytes, training_cost
from partitioner.training_time import training_time
from passes.assign_shards import AssignShards

LayOut = Callable[[Form], ir.Model]
"""Lays a model out in one form."""

Progress = Callable[[int, int, str], None]
"""(ways looked at, at most, what is looked at)."""

STEERED = 2
"""How many of the best meshes are steered."""

MOST_REFUSED = 4
"""How many times as many meshes are looked at while none fits."""

GAIN = 0.995
"""A change is made when it takes less than this part of the time before."""


@dataclass
class Search:
    """One search.

    Args:
        seeds: the model laid out along every axis that a mesh can split, on one rank each.
        lay_out: see `LayOut`.
    """

    goal: Goal
    seeds: ir.Model
    lay_out: LayOut
    progress: Progress | None = None
    looked: int = 0
    rejected: list[Rejected] = field(default_factory=list[Rejected])

    @kept_for_later()
    def choose(self) -> Choice:
        """The fastest way within the memory.

        Raises:
            PartitionError: when no mesh of so many devices keeps to the memory.
        """
        extents = extents_of(self.seeds)
        meshes = self._meshes(extents)
        found = self._best_meshes(meshes)
        if not found:
            raise PartitionError(self._refusal())
        steered = [self._steered(way) for way in found[:STEERED]] if self.goal.steers else []
        best = [*(ways[0] for ways in steered), *found[len(steered) :]]
        chosen = min(best, key=lambda way: way.seconds)
        others = [way for way in (*best, *(w for ways in steered for w in ways[1:])) if way is not chosen]
        return Choice(self.goal, chosen, tuple(sorted(others, key=lambda way: way.seconds)), tuple(self.rejected),
                      len(meshes))

    # --- meshes -------------------------------------------------------------------------------

    def _meshes(self, extents: Mapping[str, int]) -> list[Mesh]:
        goal = self.goal
        if goal.mesh is not None:
            return [goal.mesh]
        fixed = {name: len(cuts) - 1 for name, cuts in goal.cuts.items()}
        found = [mesh for mesh in meshes_of(goal.devices, extents, fixed)
                 if mesh.size == goal.devices or not goal.all_of_them]
        if not found:
            asked = ", ".join(f"{name}={count}" for name, count in fixed.items()) or "as many shards as devices"
            raise PartitionError(f"no mesh of {goal.devices} devices has what is asked for ({asked}); the volume has "
                                 + ", ".join(f"{name} {n}" for name, n in extents.items()))
        return found

    def _best_meshes(self, meshes: Sequence[Mesh]) -> list[Way]:
        """Those that keep to the memory, fastest first, until the rest is estimated to be slower."""
        goal = self.goal
        estimates = Estimates(self.seeds, meshes, goal.profile, goal.transport, goal.threads,
                              goal.optimiser is not None)
        found: list[Way] = []
        for place, index in enumerate(self._order(estimates)):
            mesh, least = meshes[index], float(estimates.seconds[index])
            if found and (least > found[0].seconds or place >= goal.most):
                self.rejected.append(Rejected(mesh, f"estimated to take {seconds_text(least)} or more"))
                continue
            if place >= MOST_REFUSED * goal.most:
                self.rejected.append(Rejected(mesh, "estimated to hold more than meshes that do not fit"))
                continue
            self._tell(f"mesh {mesh}")
            way = self.way(Form(mesh, self._cuts_for(mesh), goal.steering))
            if way is not None:
                found = sorted([*found, way], key=lambda w: w.seconds)
        return found

    def _order(self, estimates: Estimates) -> list[int]:
        """Meshes in the order in which they are looked at: those of least time that may hold whole shards, those of
        least time that go slab by slab, then those that hold least.
        """
        quick = np.argsort(estimates.seconds, kind="stable").tolist()
        if self.goal.memory is None:
            return quick
        peak = estimates.peak + fixed_bytes(self.seeds, self.goal)
        whole = [i for i in quick if peak[i] <= self.goal.memory]
        slabs = [i for i in quick if peak[i] > self.goal.memory]
        if not self.goal.slabs:
            self.rejected += [Rejected(estimates.meshes[i], f"holds {memory_text(float(peak[i]))} or more")
                              for i in slabs]
            return whole
        small = sorted(slabs[self.goal.most :], key=lambda i: peak[i])
        return [*whole, *slabs[: self.goal.most], *small]

    def _cuts_for(self, mesh: Mesh) -> dict[str, Cuts]:
        return {name: cuts for name, cuts in self.goal.cuts.items() if mesh.count(name) > 1}

    def _tell(self, what: str) -> None:
        self.looked += 1
        if self.progress is not None:
            self.progress(self.looked, max(self.looked, self.goal.most), what)

    # --- one way ------------------------------------------------------------------------------

    def way(self, form: Form, what: str = "") -> Way | None:
        """A way in whole-shard steps, or slab by slab where that suits memory or time; None where neither does."""
        try:
            found = self._laid_out(form, what)
            if self._fits(found) and form.mesh.size > 1:
                return found
            if self._fits(found):
                return self._fastest(found)
            if self.goal.slabs:
                return self._fitted(found)
            self._reject(form.mesh, found.needed)
        except PartitionError as error:
            needed = error.needed if isinstance(error, BudgetError) else None
            self._reject(form.mesh, needed, str(error).splitlines()[0] if needed is None else "")
        return None

    def _reject(self, mesh: Mesh, needed: int | None, reason: str = "", what: str = "") -> None:
        why = reason if needed is None else f"needs {memory_text(needed)} per device"
        self.rejected.append(Rejected(mesh, ": ".join(filter(None, (what, why))), needed))

    def _fits(self, way: Way) -> bool:
        return self.goal.memory is None or way.needed <= self.goal.memory

    def _laid_out(self, form: Form, what: str) -> Way:
        """In whole-shard steps."""
        model = self.lay_out(form)
        cost = plan_cost(model)
        needed = int(cost.peak.max(initial=0)) + cost.weight_bytes + self.goal.held
        way = Way(form, model, cost, self._time(model, cost), needed, what)
        return way if self.goal.optimiser is None else self._trained(way)

    def _trained(self, way: Way) -> Way:
        """A way with what a training step takes; activations are computed again where the memory asks for it."""
        found, goal = way, self.goal
        assert goal.optimiser is not None
        for checkpoint in (False, True):
            cost = training_cost(way.model, checkpoint, goal.optimiser)
            time = training_time(way.time, cost, goal.profile)
            found = replace(way, needed=int(cost.total.max(initial=0)) + goal.held, step=TrainingStep(cost, time))
            if self._fits(found):
                break
        return found

    def _time(self, model: ir.Model, cost: PlanCost) -> PlanTime:
        return plan_time(model, cost, self.goal.profile, self.goal.transport, self.goal.threads)

    def _free(self, form: Form) -> list[str]:
        """Axes that no rank splits; slabs along the first one lie most dense."""
        names = extents_of(self.seeds)
        return [n for n in (*AXIS_NAMES[1:], AXIS_NAMES[0]) if n in names and form.mesh.count(n) == 1]

    def _fastest(self, way: Way) -> Way:
        """One device's way slab by slab, where that takes no longer."""
        goal, free = self.goal, self._free(way.form)
        if not goal.slabs or goal.profile.device != "cpu" or not free or way.peak < SMALL:
            return way
        budget = goal.budget(way.form.mesh) or Budget.unlimited(goal.profile)
        return self._slabs(way, fastest(self._ordered(way.form), way.model, free, budget))

    def _fitted(self, way: Way) -> Way:
        """The way slab by slab, so that it keeps to the memory."""
        budget, free = self.goal.budget(way.form.mesh), self._free(way.form)
        assert budget is not None
        return self._slabs(way, fit(self._ordered(way.form), free if budget.together else free[:1], budget,
                                    THINNEST_SLAB))

    def _ordered(self, form: Form) -> Callable[[DepthFirst | None], ir.Model]:
        return lambda order: self.lay_out(replace(form, order=order))

    def _slabs(self, way: Way, found: Candidate) -> Way:
        """The way as its schedule has it; what one rank was found to hold stands for all."""
        if found.schedule is None:
            return way
        mesh, peak = way.form.mesh, found.memory.peak
        cost = replace(plan_cost(found.model), slab_peak=np.full(mesh.shape, peak, np.int64),
                       slab_peak_together=peak * mesh.size)
        return Way(replace(way.form, order=found.order), found.model, cost, self._time(found.model, cost),
                   found.needed, way.what)

    # --- steering -----------------------------------------------------------------------------

    def _steered(self, way: Way) -> list[Way]:
        """A way and what it becomes by one change after the other, kept when it gains; interiors first alone too."""
        found = [way]
        if way.form.mesh.size == 1 or dialect.get_schedule(way.model) is not None:
            return found

        def change(how: Callable[[Way], Iterator[Way]], ways: Sequence[Way]) -> None:
            best = found[0]
            for other in (other for changed in ways for other in how(changed)):
                gains = other.seconds < min(GAIN * best.seconds, found[0].seconds)
                found.insert(0 if gains else len(found), other)

        change(self._with_other_cuts, found[:1])
        plain = found[0]
        if self.goal.optimiser is None:
            change(self._with_replicated_layers, found[:1])
            change(self._with_deeper_halos, found[:1])
            change(self._with_interiors_first, [found[0], *([plain] if plain is not found[0] else [])])
        return found

    def _changed(self, way: Way, form: Form, what: str) -> Iterator[Way]:
        """A way with one change more, if it can be laid out and keeps to the memory."""
        self._tell(f"mesh {form.mesh}, {what}")
        try:
            found = self._laid_out(form, "; ".join(filter(None, (way.what, what))))
        except PartitionError as error:
            self._reject(form.mesh, None, str(error).splitlines()[0], what)
            return
        if self._fits(found):
            yield found
        else:
            self._reject(form.mesh, found.needed, what=what)

    def _with_other_cuts(self, way: Way) -> Iterator[Way]:
        extents, strides = extents_of(self.seeds), strides_of(self.seeds)
        mesh = way.form.mesh
        given = self._cuts_for(mesh)
        aligned = {**aligned_cuts(mesh, extents, strides), **given}
        if aligned != given:
            yield from self._changed(way, replace(way.form, cuts=aligned), "cuts at multiples of the strides")
        now = {name: way.form.cuts.get(name, even_cuts(extents[name], count)) for name, count in mesh.axes}
        balanced = {**balanced_cuts(way.time, now, strides), **given}
        if balanced not in (given, aligned):
            yield from self._changed(way, replace(way.form, cuts=balanced), "cuts that balance the time")

    def _with_replicated_layers(self, way: Way) -> Iterator[Way]:
        mesh, goal = way.form.mesh, self.goal
        nodes = list(self.seeds.graph)
        threads = threads_of_rank(goal.profile, goal.transport, mesh.size, goal.threads)
        replicated: dict[tuple[str, ...], FloatArray] = {}
        for axes in subsets(mesh):
            rest = Mesh(tuple((name, count) for name, count in mesh.axes if name not in axes))
            cuts = {name: c for name, c in way.form.cuts.items() if name not in axes}
            self._tell(f"mesh {rest}")
            model = self.lay_out(Form(rest, cuts))
            time = plan_time(model, plan_cost(model), goal.profile, goal.transport, threads)
            replicated[axes] = seconds_by_node(time, nodes)
        layouts = {str(v.name): dialect.get_layout(v) for n in way.model.graph for v in n.outputs}
        pinned = Stretches(nodes, mesh, layouts, seconds_by_node(way.time, nodes), replicated, self._sent).choose()
        pinned = {**pinned, **goal.steering.pinned}
        if pinned != goal.steering.pinned:
            steering = replace(way.form.steering, pinned=pinned)
            yield from self._changed(way, replace(way.form, steering=steering),
                                     f"{len(pinned)} small layers on all ranks")

    def _sent(self, nbytes: float, messages: int) -> float:
        return float(self.goal.profile.message_seconds(nbytes, messages, self.goal.transport))

    def _with_deeper_halos(self, way: Way) -> Iterator[Way]:
        """Where an exchange costs more than cells that are computed twice; unless the user has said which."""
        if self.goal.steering.deepened != frozenset():
            return
        mesh = way.form.mesh
        names = [name for name, count in mesh.axes if count > 1]
        points = CutPoints(way.model, names)
        halos = [s for s in way.cost.steps if dialect.is_exchange(s.node) and s.node.op_type == dialect.HALO_EXCHANGE]
        flops = float(way.cost.flops.sum())
        if not halos or not flops:
            return
        exchange = float(np.mean([self._sent(float(s.sent.max()), int(s.messages.max())) for s in halos]))
        operation = float(way.time.compute.sum()) / flops / mesh.size
        seen: set[frozenset[str]] = set()
        for times in (1.0, 4.0):
            values = points.choose(Prices(operation, 0.0, times * exchange))
            if values and values not in seen:
                seen.add(values)
                steering = replace(way.form.steering, deepened=values)
                yield from self._changed(way, replace(way.form, steering=steering),
                                         f"{len(values)} values with deeper halos")

    def _with_interiors_first(self, way: Way) -> Iterator[Way]:
        """Where the messages of an exchange take longer than the more calls that its reader's interior costs; unless
        the user has said which."""
        if self.goal.steering.overlapped != frozenset():
            return
        steering = replace(way.form.steering, overlapped=None)
        for every in self._changed(way, replace(way.form, steering=steering), "all interiors first"):
            nodes = list(self.seeds.graph)
            gains = seconds_by_node(way.time, nodes) - seconds_by_node(every.time, nodes)
            place = {str(value.name): index for index, node in enumerate(nodes) for value in node.outputs}
            chosen = {str(exchange.name) for overlap in can_overlap(every.model) for exchange in overlap.exchanges
                      if any(gains[place[str(v.name)]] > 0 for v in overlap.node.outputs if str(v.name) in place)}
            marked = {str(n.name) for n in every.model.graph if dialect.is_exchange(n) and dialect.is_overlapped(n)}
            yield every
            if chosen and chosen < marked:
                steering = replace(steering, overlapped=frozenset(chosen))
                yield from self._changed(way, replace(way.form, steering=steering), f"{len(chosen)} interiors first")

    # --- refusal ------------------------------------------------------------------------------

    def _refusal(self) -> str:
        """Why nothing does, by the meshes that need least."""
        goal = self.goal
        least = sorted(self.rejected, key=lambda item: math.inf if item.needed is None else item.needed)
        told = "; ".join(f"{mesh_text(item.mesh)} {item.reason}" for item in least[:3])
        if goal.memory is None:
            return f"on {goal.devices} devices nothing can be laid out: {told}"
        return (f"memory {memory_text(goal.memory)} for each of {goal.devices} devices is too little: {told}; give "
                "more memory, or more devices")


def laid_out_everywhere(model: ir.Model) -> ir.Model:
    """A copy of a prepared model that is laid out along every axis that a mesh can split, on one rank each."""
    found = model.clone()
    AssignShards(Mesh(()), {}, tuple(extents_of(found))).apply(found)
    return found


def fixed_bytes(seeds: ir.Model, goal: Goal) -> int:
    """Bytes that a device holds whatever the mesh: weights, their gradients, the optimiser's state and the process."""
    weights = sum(v.const_value.nbytes for v in seeds.graph.initializers.values() if v.const_value is not None)
    train = 0 if goal.optimiser is None else (1 + WORDS[goal.optimiser]) * sum(parameter_bytes(seeds))
    return weights + train + goal.held
