"""Runs the laws of the Triton kernels (*_triton_laws.py) under Triton's interpreter, where Triton is installed.

In processes of their own: the interpreter is chosen once, before triton is imported, and would take the GPU from every
other test of the session.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lizardzoo import LizardzooError
from lizardzoo.kernels import (
    gated_linear_attention,
    gated_linear_attention_step,
    heavy_attention,
    heavy_attention_step,
    hybrid_attention,
    hybrid_attention_step,
    rotate,
    token_gates,
    window_and_heavy_attention,
    window_and_heavy_step,
    window_attention,
    window_attention_step,
)
from lizardzoo.kernels.gated_linear import init_state as init_linear_state
from lizardzoo.kernels.heavy import init_state as init_heavy_state
from lizardzoo.kernels.hybrid import share
from lizardzoo.kernels.token_gates import Gate
from lizardzoo.kernels.window import init_state as init_window_state

LAWS = sorted(Path(__file__).parent.glob("*_triton_laws.py"))


def version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version(package))[:2])


def test_what_info_says_of_triton_is_what_its_kernels_take() -> None:
    """`auto_on_cuda` speaks where Triton need not be installed."""
    pytest.importorskip("triton")
    from lizardzoo.kernels.dispatch import TRITON_SIZES
    from lizardzoo.kernels.gated_linear.ops import MAX_SIZE
    from lizardzoo.kernels.token_gates.ops import MAX_COLUMNS
    from lizardzoo.kernels.window.ops import MAX_DIM

    assert {name: size for name, (size, _) in TRITON_SIZES.items()} == {
        "window_attention": MAX_DIM,
        "gated_linear_attention": MAX_SIZE,
        "hybrid_attention": MAX_SIZE,
        "token_gates": MAX_COLUMNS,
        "heavy_attention": MAX_DIM,
        "window_and_heavy_attention": MAX_DIM,
    }


@pytest.mark.parametrize("size", [16, 20, 32, 48, 64, 80, 96, 100, 112, 128, 144, 160, 200, 256, 272, 512])
def test_info_says_triton_of_a_head_dim_where_the_kernels_take_it(size: int) -> None:
    """Asked of a device, which no tensor here is on: `check` looks at shapes and dtypes alone."""
    pytest.importorskip("triton")
    from lizardzoo.kernels.dispatch import auto_on_cuda
    from lizardzoo.kernels.gated_linear.ops import check

    q: Any = SimpleNamespace(shape=(1, 1, 1, size), dtype=torch.bfloat16, is_cuda=True)
    try:
        check("gated_linear_attention", q, q, None, None)
    except LizardzooError:
        assert auto_on_cuda("gated_linear_attention", [size]).startswith("refused")
    else:
        assert auto_on_cuda("gated_linear_attention", [size]) == "triton"


@pytest.mark.parametrize("laws", LAWS, ids=lambda path: path.stem)
def test_the_laws_hold_in_the_interpreter(laws: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if version("triton") < (3, 9) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of this triton cannot loop to a run-time bound with numpy 2.4 or newer")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(laws)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


X = torch.zeros(1, 1, 1, 4)
NEAR, HELD = (
    init_window_state(1, 1, 4, 3, 0, torch.float32, "cpu"),
    init_heavy_state(1, 1, 4, 3, 2, torch.float32, "cpu"),
)
LINEAR = init_linear_state(1, 1, 1, 4, 8, 0, 0, 0, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("op", "call"),
    {
        "window_attention": lambda: window_attention(X, X, X, window=3, impl="triton"),
        "window_attention, a step": lambda: window_attention_step(X, X, X, NEAR, impl="triton"),
        "gated_linear_attention": lambda: gated_linear_attention(X, X, X, impl="triton"),
        "gated_linear_attention, a step": lambda: gated_linear_attention_step(X, X, X, None, LINEAR, impl="triton"),
        "hybrid_attention": lambda: hybrid_attention(X, X, X, window=3, lag=3, rotated=(X, X), impl="triton"),
        "hybrid_attention, a step": lambda: hybrid_attention_step(
            X, X, X, None, share(NEAR, LINEAR, True), rotated=(X, X), impl="triton"
        ),
        "heavy_attention": lambda: heavy_attention(X, X, X, X[..., 0], window=3, heavy=2, impl="triton"),
        "heavy_attention, a step": lambda: heavy_attention_step(X, X, X, X[..., 0], NEAR, HELD, impl="triton"),
        "window_and_heavy_attention": lambda: window_and_heavy_attention(X, X, X, window=3, heavy=2, impl="triton"),
        "window_and_heavy_attention, a step": lambda: window_and_heavy_step(X, X, X, NEAR, HELD, impl="triton"),
        "rotate": lambda: rotate(X, X, X[..., 0, :], X[..., 0, :], impl="triton"),
        "token_gates": lambda: token_gates(X[..., 0, :], [Gate(torch.zeros(4, 1), torch.zeros(1))], impl="triton"),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_without_the_interpreter_a_cpu_tensor_is_one_clear_error(op: str, call: Callable[[], Any]) -> None:
    with pytest.raises(
        LizardzooError, match=f"^{op.partition(',')[0]}: triton needs CUDA tensors, got cpu; pass impl="
    ):
        call()
