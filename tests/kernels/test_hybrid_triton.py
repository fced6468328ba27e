"""Runs the laws of fused hybrid attention under Triton's interpreter, where Triton is installed, in another process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.test_window_triton import version


def test_the_laws_hold_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if version("triton") < (3, 9) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of this triton cannot loop to a run-time bound with numpy 2.4 or newer")
    laws = Path(__file__).with_name("hybrid_triton_laws.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(laws)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
