"""CPU time of other processes."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from benchmarks.cpu_clock import cpu_seconds_below


def test_time_on_a_core_is_counted_and_time_asleep_is_not() -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before = cpu_seconds_below()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first = cpu_seconds_below()
        rough = sum(psutil.Process(process.pid).cpu_times()[:2])
        assert first - before >= 0.3
        assert first - before == pytest.approx(rough, abs=0.1)
        assert cpu_seconds_below() - first < 0.1
        process.communicate(b"\n")
