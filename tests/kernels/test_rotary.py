"""The rotary embedding: the reference against a rotation of complex numbers, and what a rotation must keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lizardzoo import LizardzooError
from lizardzoo.kernels import rotate


def tables(positions: Tensor, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """cos, sin [B, T, D] at positions [B, T]."""
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def draw(dim: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """q [2, 5, 4, dim], k [2, 5, 2, dim], as leaves."""
    return torch.randn(2, 5, 4, dim, dtype=dtype).requires_grad_(), torch.randn(2, 5, 2, dim, dtype=dtype)


POSITIONS = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 0, 1, 100]])


def test_it_turns_pairs_of_numbers_as_complex_ones() -> None:
    q, k = draw()
    cos, sin = tables(POSITIONS, 6)
    turn = torch.complex(cos, sin)[:, :, None, :3]
    for actual, x in zip(rotate(q, k, cos, sin), (q, k), strict=True):
        turned = torch.complex(x[..., :3], x[..., 3:]) * turn
        torch.testing.assert_close(actual, torch.cat([turned.real, turned.imag], -1), rtol=1e-12, atol=1e-12)


def test_scores_depend_on_the_distance_only() -> None:
    q, k = draw()
    near = rotate(q, k, *tables(POSITIONS, 6))
    far = rotate(q, k, *tables(POSITIONS + 12345, 6))
    scores = [torch.einsum("bihd,bjhd->bhij", q[:, :, :2], k) for q, k in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-9, atol=1e-9)


def test_two_turns_are_one_turn_by_the_sum() -> None:
    q, k = draw()
    twice = rotate(*rotate(q, k, *tables(POSITIONS, 6)), *tables(POSITIONS * 2, 6))
    torch.testing.assert_close(twice, rotate(q, k, *tables(POSITIONS * 3, 6)), rtol=1e-12, atol=1e-12)


def test_norms_stay() -> None:
    q, k = draw()
    for turned, x in zip(rotate(q, k, *tables(POSITIONS, 6)), (q, k), strict=True):
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=1e-12)


def test_the_gradient_is_turned_back() -> None:
    q, k = draw()
    cos, sin = tables(POSITIONS, 6)
    turned, _ = rotate(q, k, cos, sin)
    dy = torch.randn_like(turned)
    (dq,) = torch.autograd.grad(turned, q, dy)
    torch.testing.assert_close(dq, rotate(dy, k, cos, -sin)[0], rtol=1e-12, atol=1e-12)


def test_tables_get_no_gradient() -> None:
    q, k = draw()
    cos, sin = (table.requires_grad_() for table in tables(POSITIONS, 6))
    rotate(q, k, cos, sin)[0].sum().backward()
    assert cos.grad is None and sin.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_teachers_bit_for_bit(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = draw(16, dtype)
    cos, sin = tables(POSITIONS, 16, dtype)
    teachers = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for ours, theirs in zip(rotate(q, k, cos, sin), teachers, strict=True):
        assert torch.equal(ours, theirs.transpose(1, 2))


def test_the_result_has_the_dtype_of_q() -> None:
    q, k = draw(6, torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for x in rotate(q, k, *tables(POSITIONS[:1], 6, torch.float32)))


def test_wrong_input_is_one_clear_error() -> None:
    q, k = draw()
    cos, sin = tables(POSITIONS, 6)
    for arguments, words in [
        ((q[..., :5], k[..., :5], cos[..., :5], sin[..., :5]), "an even D"),
        ((q, k[:, :3], cos, sin), "do not fit"),
        ((q, k, cos[:, :1], sin), r"cos is \[1 or 2, 5, 6\], got \[2, 1, 6\]"),
        ((q, k, cos, sin[..., :3]), r"sin is \[1 or 2, 5, 6\], got \[2, 5, 3\]"),
        ((q, k.float(), cos, sin), "dtypes torch.float64, torch.float32"),
        ((q, k, cos.long(), sin), "floating-point"),
    ]:
        with pytest.raises(LizardzooError, match=words):
            rotate(*arguments)


def test_triton_without_the_interpreter_is_one_clear_error_on_a_cpu() -> None:
    with pytest.raises(LizardzooError, match="triton needs CUDA tensors, got cpu"):
        rotate(*draw(), *tables(POSITIONS, 6), impl="triton")
