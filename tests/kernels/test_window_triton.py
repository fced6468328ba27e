"""Runs the laws of the Triton window kernels under Triton's interpreter, where Triton is installed.

In a process of their own: the interpreter is chosen once, before triton is imported, and would take the GPU from every
other test of the session.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lizardzoo import LizardzooError
from lizardzoo.kernels import window_attention


def version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version(package))[:2])


def test_the_laws_hold_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if version("triton") < (3, 9) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of this triton cannot loop to a run-time bound with numpy 2.4 or newer")
    laws = Path(__file__).with_name("window_triton_laws.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(laws)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_without_the_interpreter_a_cpu_tensor_is_one_clear_error() -> None:
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(LizardzooError, match="triton needs CUDA tensors, got cpu"):
        window_attention(q, q, q, window=3, impl="triton")
