"""The command `partition`: plan, report, compile, run, verify, calibrate, forecast."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from partitioner import __version__
from partitioner.arguments import (
    add_backend_options,
    add_link_option,
    add_model_options,
    add_wrapping_options,
    tolerance,
)
from partitioner.calibrating import calibrate_machine, threads
from partitioner.console import (
    ProgressBar,
    Unwritable,
    complain,
    print_json,
    say,
    show,
    speaks_for_all,
    vars_of,
    write,
)
from partitioner.errors import AgreedError, AgreedFailure, ExecutionError, PartitionError
from partitioner.forecasting import add_forecast_options, forecast_devices
from partitioner.running import load_named_operators, run_files
from partitioner.signals import Ended, orderly_end

if TYPE_CHECKING:
    from partitioner.api import Plan
    from partitioner.training_report import TrainingReport

EXAMPLES = """examples:
  partition plan unet3d.onnx --mesh depth=2,height=2 --shape volume=1x1x121x160x143
  partition plan unet3d.onnx --devices 8 --memory 40GiB --profile h100
  partition compile unet3d.onnx --mesh 2x2x1 -o unet3d.plan.onnx
  partition run unet3d.onnx --mesh depth=2 --backend gloo --input ct.nii.gz --output logits.nii.gz
  partition verify unet3d.plan.onnx --backend gloo
  partition calibrate
  partition forecast unet3d.onnx --devices 1,2,4,...,4096 --sizes 256,512,1024 --memory 40GiB --profile h100
  torchrun --nnodes 2 ... -m partitioner.cli run unet3d.plan.onnx --input ct.npy --output logits.npy
"""


Action = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as all of the command does."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("partition").strip()
        self.exit(2, f"partition: {command + ': ' if command else ''}{message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed while running, 2 a mistake of the user.

    SIGINT, SIGTERM and SIGHUP end it with 128 + their number, after everything half done has been removed.
    """
    for name in ("stdout", "stderr"):  # closed by whoever started us
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
    options = _parser().parse_args(arguments)
    try:
        with orderly_end():
            return options.action(options)
    except (AgreedError, AgreedFailure) as error:
        code = 2 if isinstance(error, PartitionError) else 1
        return complain(error, code) if speaks_for_all() else code
    except PartitionError as error:
        return complain(error, 2)
    except ExecutionError as error:
        return complain(error, 1)
    except Ended as end:
        return complain(f"{end.reason}; no output was written", end.code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Unwritable as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return complain(f"the standard output cannot be written ({error}); redirect it elsewhere", 1)
    except Exception as error:
        if os.environ.get("PARTITIONER_TRACEBACK"):
            raise
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        return complain(f"internal error: {type(error).__name__}: {line[:300]}; "
                         "set PARTITIONER_TRACEBACK=1 for the details and report it", 1)


def _with_operators(action: Action) -> Action:
    """The action, after the user's own operators have been imported."""
    def act(options: argparse.Namespace) -> int:
        load_named_operators(options.operators)
        return action(options)

    return act


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="partition", description="Run convolutional networks on images too large for one device, exactly.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"partition {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    plan = _command(commands, "plan", _with_operators(_plan), "show layouts, halos, memory and traffic of a partition")
    add_model_options(plan, "MODEL", "an ONNX model (or a plan)")
    add_link_option(plan)
    plan.add_argument("--train", metavar="OPTIMISER", choices=("adam", "momentum", "sgd", "none"),
                      help="tell what a training step takes with adam, momentum, sgd or none; with --devices, choose "
                           "for it and not for inference")
    plan.add_argument("--explain", metavar="NODE", action="append", default=[],
                      help="tell what was decided at a node, and what that takes in the other plans (with --devices; "
                           "repeat)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    report = _command(commands, "report", _with_operators(_report), "write a page that shows a partition (HTML)")
    add_model_options(report, "MODEL|PLAN", "an ONNX model, or a plan made by `partition compile`")
    add_link_option(report)
    report.add_argument("-o", "--output", metavar="FILE.html", required=True, help="page to write")
    compile_ = _command(commands, "compile", _with_operators(_compile), "write a partition as an ONNX file")
    add_model_options(compile_, "MODEL", "an ONNX model (or a plan)")
    add_link_option(compile_)
    compile_.add_argument("-o", "--output", metavar="FILE", help="file to write (text goes to the screen without it)")
    compile_.add_argument("--emit", choices=("plan", "devices", "text"), default="plan",
                          help="plan: one node for all shards (default); devices: every device's own nodes, up to 64; "
                               "text: the printed form")
    compile_.add_argument("--dump-dir", metavar="DIR", help="write a numbered ONNX file after every pass")
    run = _command(commands, "run", run_files, "run a model or plan on files")
    add_model_options(run, "MODEL|PLAN", "an ONNX model, or a plan made by `partition compile`")
    run.add_argument("--input", metavar="[NAME=]FILE", action="append", required=True,
                     help="volume to read: .npy, .npz, .nii, .nii.gz, .h5, .zarr, .tif, or a folder of TIFF or DICOM "
                          "slices (repeat for several inputs; A,B,... for files that hold the channels of one); of a "
                          "folder of volumes each is a case")
    run.add_argument("--output", metavar="[NAME=]FILE", action="append", required=True,
                     help="volume to write, in the same formats but DICOM (repeat for several outputs); of cases a "
                          "folder")
    run.add_argument("--resume", action="store_true",
                     help="save the run every few minutes beside the output, and go on from there when it was stopped")
    run.add_argument("--overwrite", action="store_true", help="replace outputs that exist (else the run is refused)")
    add_backend_options(run)
    verify = _command(commands, "verify", _with_operators(_verify),
                      "compare with onnxruntime on the unpartitioned model")
    add_model_options(verify, "MODEL|PLAN", "an ONNX model, or a plan made by `partition compile`")
    verify.add_argument("--input", metavar="[NAME=]FILE", action="append", help="volume to use (random without it)")
    verify.add_argument("--tolerance", type=tolerance, metavar="X",
                        help="largest error relative to the output's largest value (1e-4 for float32)")
    add_backend_options(verify)
    calibrate = _command(commands, "calibrate", calibrate_machine,
                         "measure this machine, so that times are forecast for it")
    calibrate.add_argument("-o", "--output", metavar="FILE",
                           help="profile to write (default: where other commands look, in the user's cache folder)")
    calibrate.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda or cuda:N")
    calibrate.add_argument("--threads", type=threads, metavar="N",
                           help="CPU threads of a process (default: measured for 1 and for all cores)")
    calibrate.add_argument("--quick", action="store_true", help="in less time, less precise")
    calibrate.set_defaults(json=False)
    forecast = _command(commands, "forecast", _with_operators(forecast_devices),
                        "tell what a model will take on few and many devices")
    add_forecast_options(forecast)
    add_wrapping_options(forecast)
    return parser


def _command(commands: Any, name: str, action: Any, text: str) -> argparse.ArgumentParser:
    found = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    found.set_defaults(action=action, action_name=name, held=None)
    return found


def _plan(options: argparse.Namespace) -> int:
    from partitioner.options import load_plan
    from partitioner.report import render

    with ProgressBar(options, options.devices is not None) as progress:
        plan = load_plan(options, progress=progress)
    said = [plan.explain(node) for node in options.explain]
    step = None if options.train is None else _training_step(plan, options)
    if options.json:
        print_json({**plan.to_dict(), **({"explained": said} if said else {}),
                    **({} if step is None else {"training": step.to_dict()})})
        return 0
    if said:
        write("\n\n".join(said) + "\n")
        return 0
    parts = [render(plan.model, plan.cost), *([] if step is None else [step.render()])]
    if plan.choice is not None:
        from partitioner.planner.explain import render_choice

        parts.append(render_choice(plan.choice))
    show(*parts)
    return 0


def _training_step(plan: Plan, options: argparse.Namespace) -> TrainingReport:
    """What a training step of the plan takes."""
    from partitioner.planning import usual_transport
    from partitioner.profile import Profile

    profile = Profile.find(options.profile)
    chosen = None if plan.choice is None else plan.choice.goal.transport
    transport = options.backend or chosen or usual_transport(profile, plan.mesh.size)
    return plan.training_report(options.train, profile, transport)


def _report(options: argparse.Namespace) -> int:
    from partitioner.options import load_plan

    load_plan(options).report_html(options.output, os.path.basename(options.model))
    say(f"wrote {options.output}")
    return 0


def _compile(options: argparse.Namespace) -> int:
    from pathlib import Path

    from partitioner.loader import save_model, write_text
    from partitioner.options import load_plan

    target: str | None = options.output
    if target is None and options.emit != "text":
        raise PartitionError("compile: name the file to write with -o FILE")
    plan = load_plan(options)
    if target is None:
        write(plan.to_text())
        return 0
    if options.emit == "text":
        write_text(Path(target), plan.to_text())
    elif options.emit == "devices":
        save_model(plan.expand(), Path(target))
    else:
        plan.save(target)
    say(f"wrote {target}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from partitioner.options import load_plan, prepare_files, read_all
    from partitioner.verify import verify
    from runtime.allocator import keep_memory_tight
    from runtime.group import place_from_environment

    place = place_from_environment()
    if place is not None and place.size > 1:
        raise AgreedError("verify starts its own ranks; start it without torchrun or srun")
    keep_memory_tight()
    arrays: dict[str, Any] | None = None
    if options.input:
        plan, files = prepare_files(options)
        arrays = read_all(plan, files)
    else:
        plan = load_plan(options)
    with ProgressBar(options, True) as progress:
        found = verify(plan, arrays, options.backend or "lockstep", options.device, options.tolerance, progress)
    if options.json:
        print_json({"passed": found.passed, "reference": found.reference, "mesh": dict(plan.mesh.axes),
                     "outputs": [{**_finite(vars_of(o)), "passed": o.passed} for o in found.outputs]})
    else:
        for item in found.outputs:
            verdict = "ok" if item.passed else "TOO LARGE"
            said = f"{item.name}: largest error {item.absolute:.3g}, relative {item.relative:.3g} "
            if item.differing == 0:
                said = f"{item.name}: no label differs "
            elif item.differing is not None:
                said = (f"{item.name}: {item.differing} labels differ, where scores are {item.absolute:.3g} apart at "
                        f"most, relative {item.relative:.3g} ")
            say(f"{said}(tolerance {item.tolerance:g}) {verdict}")
        say(f"reference: {found.reference}; mesh {plan.mesh}")
    return 0 if found.passed else 1


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """The same with null for what JSON has no number for."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


if __name__ == "__main__":
    sys.exit(main())
