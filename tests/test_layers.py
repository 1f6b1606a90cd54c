"""Imports point downwards only, every module has its layer, and planning needs neither torch nor onnx."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "pyproject.toml"


def layers() -> set[str]:
    """The modules that the contract names."""
    contracts = tomllib.loads(CONFIG.read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (c for c in contracts if c["id"] == "layers")
    names = (name for row in contract["layers"] for name in row.replace("|", ":").split(":"))
    return {name.strip(" ()") for name in names}


def test_imports_point_downwards(monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=str(CONFIG), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_every_module_has_a_layer() -> None:
    modules = {f"partitioner.{path.stem}" for path in (ROOT / "partitioner").glob("*.py")}
    modules |= {f"partitioner.{path.parent.name}" for path in (ROOT / "partitioner").glob("*/__init__.py")}
    missing = modules - {"partitioner.__init__"} - layers()
    assert not missing, f"give {sorted(missing)} a place in [tool.importlinter] of pyproject.toml"


def test_the_linter_sees_a_wrong_import(tmp_path, monkeypatch) -> None:
    """The contracts must be able to fail: the same configuration over a tree with one wrong import."""
    trees = [name.removeprefix("partitioner.") for name in layers() if name.startswith("partitioner.")]
    for package in ("partitioner", "passes", "runtime", "benchmarks"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    for name in trees:
        (tmp_path / "partitioner" / f"{name}.py").touch()
    (tmp_path / "pyproject.toml").write_text(CONFIG.read_text())
    assert _lint(tmp_path) == 0
    wrong = {
        "partitioner/geometry.py": "from partitioner.mesh import Mesh\n",
        "passes/a.py": "import runtime\n",
        "runtime/a.py": "import partitioner.api\n",
        "benchmarks/a.py": "from partitioner import geometry\n",
    }
    for path, line in wrong.items():
        (tmp_path / path).write_text(line)
        assert _lint(tmp_path) == 1, path
        (tmp_path / path).write_text("")


def test_the_core_loads_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, partitioner, partitioner.exchange, partitioner.mesh, partitioner.layout\n"
        "heavy = sorted({'torch', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import contextlib, io, sys\n"
        "import partitioner.cli\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    partitioner.cli.main(['plan', '--help'])\n"
        "heavy = sorted({'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'rich', 'sympy'} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_ranks_load_what_they_run_with_and_nothing_that_compiles() -> None:
    """A process per rank begins with these imports: torch and the reader of plans take most of its start."""
    code = (
        "import sys\n"
        "import torch, runtime.worker, runtime.group, runtime.rank, partitioner.loader\n"
        "left = {'onnxruntime', 'onnxscript', 'networkx', 'rich', 'torch.onnx', 'torch._dynamo', 'torch._inductor',\n"
        "        'partitioner.compiler', 'partitioner.api', 'passes.pipeline'}\n"
        "assert not left & set(sys.modules), sorted(left & set(sys.modules))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _lint(folder: Path) -> int:
    """The linter's exit status over a folder, in a process of its own: it imports what it checks."""
    code = "import importlinter.cli as linter; raise SystemExit(linter.lint_imports(no_cache=True))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode
