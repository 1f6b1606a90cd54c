"""The command `partition`: plan, compile, run, verify."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from partitioner import __version__
from partitioner.errors import ExecutionError, PartitionError

if TYPE_CHECKING:
    from partitioner.api import Plan, Progress

EXAMPLES = """examples:
  partition plan unet3d.onnx --mesh depth=2,height=2 --shape volume=1x1x121x160x143
  partition compile unet3d.onnx --mesh 2x2x1 -o unet3d.plan.onnx
  partition run unet3d.onnx --mesh depth=2 --backend gloo --input ct.nii.gz --output logits.nii.gz
  partition verify unet3d.plan.onnx --backend gloo
  torchrun --nnodes 2 ... -m partitioner.cli run unet3d.plan.onnx --input ct.npy --output logits.npy
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed while running, 2 a mistake of the user."""
    options = _parser().parse_args(arguments)
    try:
        return options.action(options)
    except PartitionError as error:
        return _complain(error, 2)
    except ExecutionError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted; no output was written", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("PARTITIONER_TRACEBACK"):
            raise
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        return _complain(f"internal error: {type(error).__name__}: {line[:300]}; "
                         "set PARTITIONER_TRACEBACK=1 for the details and report it", 1)


def _complain(error: Exception | str, code: int) -> int:
    for line in str(error).splitlines():
        sys.stderr.write(f"partition: {line}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="partition", description="Run convolutional networks on images too large for one device, exactly.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"partition {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    plan = _command(commands, "plan", _plan, "show layouts, halos, memory and traffic of a partition")
    _model_options(plan, "MODEL", "an ONNX model (or a plan)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    compile_ = _command(commands, "compile", _compile, "write a partition as an ONNX file")
    _model_options(compile_, "MODEL", "an ONNX model (or a plan)")
    compile_.add_argument("-o", "--output", metavar="FILE", help="file to write (text goes to the screen without it)")
    compile_.add_argument("--emit", choices=("plan", "devices", "text"), default="plan",
                          help="plan: one node for all shards (default); devices: every device's own nodes, up to 64; "
                               "text: the printed form")
    compile_.add_argument("--dump-dir", metavar="DIR", help="write a numbered ONNX file after every pass")
    run = _command(commands, "run", _run, "run a model or plan on files")
    _model_options(run, "MODEL|PLAN", "an ONNX model, or a plan made by `partition compile`")
    run.add_argument("--input", metavar="[NAME=]FILE", action="append", required=True,
                     help="volume to read: .npy, .npz, .nii, .nii.gz (repeat for several inputs)")
    run.add_argument("--output", metavar="[NAME=]FILE", action="append", required=True,
                     help="volume to write, in the same formats (repeat for several outputs)")
    _backend_options(run)
    verify = _command(commands, "verify", _verify, "compare with onnxruntime on the unpartitioned model")
    _model_options(verify, "MODEL|PLAN", "an ONNX model, or a plan made by `partition compile`")
    verify.add_argument("--input", metavar="[NAME=]FILE", action="append", help="volume to use (random without it)")
    verify.add_argument("--tolerance", type=float, metavar="X",
                        help="largest error relative to the output's largest value (1e-4 for float32)")
    _backend_options(verify)
    return parser


def _command(commands: Any, name: str, action: Any, text: str) -> argparse.ArgumentParser:
    found = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    found.set_defaults(action=action)
    return found


def _model_options(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    parser.add_argument("model", metavar=metavar, help=text)
    parser.add_argument("--mesh", metavar="AXES", help="ranks per axis: depth=2,height=2, or 2x2x1 for the spatial "
                                                       "axes in order; axes are batch, depth, height, width")
    parser.add_argument("--shape", metavar="[NAME=]1x1xDxHxW", action="append", default=[],
                        help="extents of an input (needed where the model leaves axes open)")
    parser.add_argument("--cuts", metavar="AXIS=P,P,...", action="append", default=[],
                        help="where shards begin along a mesh axis, e.g. depth=50 for shards 0-50 and 50-end")


def _backend_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=("lockstep", "gloo", "nccl"),
                        help="lockstep: all shards in this process (default); gloo, nccl: one process per rank")
    parser.add_argument("--device", default="cpu", metavar="DEVICE",
                        help="cpu (default), cuda, or a list for the ranks in turn: cuda:0,cuda:1")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")


def _shapes(options: argparse.Namespace, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for text in options.shape:
        name, _, extents = text.rpartition("=")
        if not name and len(names) != 1:
            raise PartitionError(f"--shape {text}: the model has {len(names)} inputs ({', '.join(names)}); "
                                 f"write NAME={text}")
        try:
            found[name or names[0]] = tuple(int(n) for n in extents.lower().split("x"))
        except ValueError:
            raise PartitionError(f"--shape {text}: extents are integers joined by x, as 1x1x64x64x64") from None
    return found


def _cuts(options: argparse.Namespace, extents: dict[str, int]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for text in options.cuts:
        name, _, positions = text.partition("=")
        try:
            inner = tuple(int(p) for p in positions.split(",") if p)
        except ValueError:
            raise PartitionError(f"--cuts {text}: positions are integers joined by commas, as depth=50,80") from None
        if name not in extents:
            raise PartitionError(f"--cuts {text}: the volume has no axis '{name}'; use {', '.join(extents)}")
        found[name] = (0, *inner, extents[name])
    return found


def _axis_extents(shape: Sequence[int]) -> dict[str, int]:
    from partitioner.mesh import spatial_names

    names = spatial_names(len(shape) - 2) if 3 <= len(shape) <= 5 else ()
    return {"batch": shape[0], **dict(zip(names, shape[2:], strict=True))} if shape else {}


def _load_plan(options: argparse.Namespace, file_shapes: dict[str, tuple[int, ...]] | None = None) -> Plan:
    """The plan that the options ask for: read from a file, or compiled now."""
    from pathlib import Path

    from partitioner import dialect
    from partitioner.api import Plan, check_plan
    from partitioner.loader import load_file
    from partitioner.mesh import Mesh

    model = load_file(Path(options.model))
    names = [str(v.name) for v in model.graph.inputs if v.name not in model.graph.initializers]
    shapes = {**(file_shapes or {}), **_shapes(options, names)}
    if dialect.is_plan(model):
        check_plan(model, options.model)
        plan = Plan(model)
        if options.mesh and str(Mesh.parse(options.mesh)) != str(plan.mesh):
            raise PartitionError(f"{options.model}: is a plan for the mesh {plan.mesh}, not {options.mesh}; "
                                 "leave --mesh out, or give the model")
        if options.cuts:
            raise PartitionError(f"{options.model}: is a plan with cuts of its own; give the model to cut it anew")
        wrong = {n: s for n, s in _shapes(options, names).items() if plan.input_shapes.get(n) != s}
        return plan.with_shapes(wrong) if wrong else plan
    volume = max(shapes.values(), key=len, default=None) or _declared(model)
    cuts = _cuts(options, _axis_extents(volume))
    dump = getattr(options, "dump_dir", None)
    return Plan.compile(model, options.mesh, shapes, cuts, None if dump is None else Path(dump))


def _declared(model: Any) -> tuple[int, ...]:
    """Static extents of the input with most axes; none when they are open."""
    shapes = [v.shape for v in model.graph.inputs if v.shape is not None and v.shape.is_static()]
    best = max(shapes, key=len, default=())
    return tuple(int(n) for n in best)


def _plan(options: argparse.Namespace) -> int:
    from partitioner.report import render

    plan = _load_plan(options)
    if options.json:
        _print_json(plan.to_dict())
        return 0
    _console().print(render(plan.model, plan.cost))
    return 0


def _compile(options: argparse.Namespace) -> int:
    from pathlib import Path

    from partitioner.loader import save_model, write_text

    target: str | None = options.output
    if target is None and options.emit != "text":
        raise PartitionError("compile: name the file to write with -o FILE")
    plan = _load_plan(options)
    if target is None:
        sys.stdout.write(plan.to_text())
        return 0
    if options.emit == "text":
        write_text(Path(target), plan.to_text())
    elif options.emit == "devices":
        save_model(plan.expand(), Path(target))
    else:
        plan.save(target)
    _say(f"wrote {target}")
    return 0


def _assignments(given: Sequence[str]) -> list[tuple[str | None, str]]:
    pairs = [text.partition("=") for text in given]
    return [(name, path) if equals else (None, name) for name, equals, path in pairs]


def _prepare_files(options: argparse.Namespace) -> tuple[Plan, dict[str, str]]:
    """The plan and its input files; open axes take their extents from the files."""
    from pathlib import Path

    from partitioner import dialect
    from partitioner.files import name_files, open_inputs
    from partitioner.loader import load_file

    model = load_file(Path(options.model))
    values = {str(v.name): v for v in model.graph.inputs if v.name not in model.graph.initializers}
    files = name_files(_assignments(options.input), list(values), "input")
    dtypes = {name: v.dtype for name, v in values.items() if v.dtype is not None}
    sources = open_inputs(files, dtypes)
    shapes = {name: tuple(source.shape) for name, source in sources.items()}
    for source in sources.values():
        source.close()
    return _load_plan(options, None if dialect.is_plan(model) else shapes), files


def _run(options: argparse.Namespace) -> int:
    from partitioner.files import FileRun, name_files
    from runtime.allocator import keep_memory_tight
    from runtime.group import place_from_environment

    keep_memory_tight()
    plan, inputs = _prepare_files(options)
    outputs = name_files(_assignments(options.output), [str(v.name) for v in plan.model.graph.outputs], "output")
    place = place_from_environment()
    joined = place is not None and options.backend != "lockstep"
    backend = options.backend or (("nccl" if options.device.startswith("cuda") else "gloo") if joined else "lockstep")
    job = FileRun(plan, inputs, outputs, backend, options.device)
    with _progress(options, place is None or place.rank == 0) as progress:
        report = job.join(place, progress) if joined and place is not None else job.run(progress)
    if report is None:
        return 0
    if options.json:
        _print_json({
            "outputs": outputs, "backend": backend, "mesh": dict(plan.mesh.axes), "seconds": report.seconds,
            "peak_bytes": report.peak_bytes, "predicted_peak_bytes": int(plan.cost.peak.max(initial=0)),
            "predicted_sent_bytes": [int(n) for n in plan.cost.sent.reshape(-1)],
            "ranks": [vars_of(r) for r in report.ranks]})
        return 0
    from partitioner.report import size_text

    sent = sum(r.sent_bytes for r in report.ranks)
    _say(f"wrote {', '.join(dict.fromkeys(outputs.values()))} in {report.seconds:.2f} s; "
         f"{size_text(sent)} in {sum(r.messages for r in report.ranks)} messages; "
         f"peak {size_text(report.peak_bytes)} {'in this process' if backend == 'lockstep' else 'on a rank'}")
    return 0


def vars_of(record: Any) -> dict[str, Any]:
    """A dataclass as a dict."""
    from dataclasses import asdict

    return asdict(record)


def _verify(options: argparse.Namespace) -> int:
    from partitioner.verify import verify
    from runtime.allocator import keep_memory_tight

    keep_memory_tight()
    arrays: dict[str, Any] | None = None
    if options.input:
        plan, files = _prepare_files(options)
        arrays = _read_all(plan, files)
    else:
        plan = _load_plan(options)
    with _progress(options, True) as progress:
        found = verify(plan, arrays, options.backend or "lockstep", options.device, options.tolerance, progress)
    if options.json:
        _print_json({"passed": found.passed, "reference": found.reference, "mesh": dict(plan.mesh.axes),
                     "outputs": [{**vars_of(o), "passed": o.passed} for o in found.outputs]})
    else:
        for item in found.outputs:
            verdict = "ok" if item.passed else "TOO LARGE"
            _say(f"{item.name}: largest error {item.absolute:.3g}, relative {item.relative:.3g} "
                 f"(tolerance {item.tolerance:g}) {verdict}")
        _say(f"reference: {found.reference}; mesh {plan.mesh}")
    return 0 if found.passed else 1


def _read_all(plan: Plan, files: dict[str, str]) -> dict[str, Any]:
    from partitioner.files import check_sources, open_inputs

    dtypes = {str(v.name): v.dtype for v in plan.model.graph.inputs if v.dtype is not None}
    sources = open_inputs(files, dtypes)
    check_sources(plan, sources)
    return {name: source.read() for name, source in sources.items()}


def _console() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160, no_color=True)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


class _progress:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, options: argparse.Namespace, wanted: bool) -> None:
        self._bar: Any = None
        self._wanted = wanted and not options.json and sys.stderr.isatty()

    def __enter__(self) -> Progress | None:
        if not self._wanted:
            return None
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._bar = Bar(console=Console(stderr=True), transient=True)
        self._bar.start()
        task = self._bar.add_task("starting", total=None)

        def show(done: int, count: int, name: str) -> None:
            self._bar.update(task, completed=done, total=count, description=name[:40])

        return show

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


if __name__ == "__main__":
    sys.exit(main())
