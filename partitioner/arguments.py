"""The options that several commands have in common."""

from __future__ import annotations

import argparse
import math


def tolerance(text: str) -> float:
    """A number from 0; argparse names it after this function when it is none."""
    found = float(text)
    if not 0 <= found < math.inf:
        raise ValueError(text)
    return found


def whole_number(text: str) -> int:
    """A number from 1; argparse names it after this function when it is none."""
    found = int(text)
    if found < 1:
        raise ValueError(text)
    return found


def add_model_options(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    """The model, and how it is to be partitioned."""
    parser.add_argument("model", metavar=metavar, help=text)
    parser.add_argument("--mesh", metavar="AXES", help="ranks per axis: depth=2,height=2, or 2x2x1 for the spatial "
                                                       "axes in order; axes are batch, depth, height, width")
    parser.add_argument("--shape", metavar="[NAME=]1x1xDxHxW", action="append", default=[],
                        help="extents of an input (needed where the model leaves axes open)")
    parser.add_argument("--cuts", metavar="AXIS=P,P,...", action="append", default=[],
                        help="where shards begin along a mesh axis, e.g. depth=50 for shards 0-50 and 50-end")
    parser.add_argument("--devices", metavar="N", type=whole_number,
                        help="choose the mesh, the cuts and more for up to N devices; what --mesh, --cuts and --pin "
                             "say stays")
    add_profile_option(parser)
    parser.add_argument("--pin", metavar="NODE=replicated", action="append", default=[],
                        help="let all ranks compute a node, or all along some mesh axes: NODE=depth,height (repeat)")
    parser.add_argument("--deepen", metavar="VALUE", action="append", default=[],
                        help="let ranks compute the halo of a value themselves, so that several layers share one "
                             "deeper exchange; all: of every value that can be (repeat)")
    parser.add_argument("--overlap", metavar="EXCHANGE", action="append", default=[],
                        help="compute what needs no halo while a halo exchange is under way; all: in every one that "
                             "can (repeat)")
    parser.add_argument("--memory", metavar="SIZE",
                        help="what a process may hold, as 2GiB (with --devices, each of them); the plan is executed "
                             "depth-first, slab by slab, where that needs less")
    parser.add_argument("--host-memory", metavar="SIZE",
                        help="of that, what may rest in memory between chains; the rest goes into temporary files")
    parser.add_argument("--no-slabs", action="store_true",
                        help="let every step take a whole shard, also where slabs are faster or smaller")
    add_operator_options(parser)
    add_wrapping_options(parser)


def add_profile_option(parser: argparse.ArgumentParser) -> None:
    """What the devices can do."""
    parser.add_argument("--profile", metavar="NAME|FILE",
                        help="what a device can do (see `partition calibrate`): a100, h100, h200, or a file")


def add_operator_options(parser: argparse.ArgumentParser) -> None:
    """Which operators are taken."""
    parser.add_argument("--strict", action="store_true",
                        help="refuse operators without a sharded rule (else they run replicated, as the plan shows)")
    parser.add_argument("--operators", metavar="FILE.py|MODULE", action="append", default=[],
                        help="import your own operator classes (see docs/operators.md)")


def add_link_option(parser: argparse.ArgumentParser) -> None:
    """How messages travel, where nothing is run."""
    parser.add_argument("--backend", metavar="LINK",
                        help="how messages travel, for --devices: lockstep, gloo, shm, nccl, network (default: what "
                             "suits the profile)")


def add_wrapping_options(parser: argparse.ArgumentParser) -> None:
    """What is put around the network; all of it becomes part of the graph."""
    parser.add_argument("--preprocess", metavar="[NAME=]STEP", action="append", default=[],
                        help="a step before the network, in the order given: window=-160:240, clip=LOW:HIGH, "
                             "normalize=MEAN:DEVIATION, zscore, zscore=nonzero, dtype=int16, axes=zyx (repeat)")
    parser.add_argument("--channels", metavar="[NAME=]COUNT", action="append", default=[],
                        help="an input's channels come from COUNT files (run and verify see it from --input A,B,...)")
    parser.add_argument("--tta", metavar="flips[=AXIS,...]", help="the mean over all flips of the volume")
    parser.add_argument("--ensemble", metavar="MODEL", action="append", default=[],
                        help="the mean with another model of the same inputs and outputs (repeat)")
    parser.add_argument("--output-op", metavar="[NAME=]OP", action="append", default=[],
                        help="an operation on an output: softmax, sigmoid, argmax, threshold=0.5 (repeat)")


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """Where and how a plan is run."""
    parser.add_argument("--backend", choices=("lockstep", "gloo", "nccl", "shm"),
                        help="lockstep: all shards in this process (default); one process per rank: gloo, nccl, shm "
                             "(shared memory of this host)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE",
                        help="cpu (default), cuda, or a list for the ranks in turn: cuda:0,cuda:1")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
