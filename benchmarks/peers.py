"""The peers: a compiled windowed flex_attention, fla's gated linear attention, and the hybrid composed of the two.

The composed peer is what a good engineer builds of the best public kernels: torch.compile around everything that is
not a kernel, one Hedgehog map per head, and the normalizer as a column of ones in v.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from contenders import BOTH, LINEAR, ROTATED, WINDOW, Contender, Function, Inputs, composition, gated_linear, window
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128
SUMS = 8
"""Columns of ones beside v. One makes the normalizer; fla's backward takes no odd width, and loads are of 16 bytes."""
REFUSAL = "timing only, gradients known to be wrong (fla issue 640)"
torch._dynamo.config.recompile_limit = 64  # each shape and length compiles anew, which is what makes them fast

_compiled_flex: Any = torch.compile(flex_attention, dynamic=False)


def _in_window(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query >= key) & (query - key < WINDOW)


@cache
def _block_mask(tokens: int, device: torch.device) -> BlockMask:
    """Keys i-127 .. i, written down as blocks: create_block_mask first makes a matrix of tokens x tokens."""
    assert WINDOW == BLOCK, "a query block then sees its own key block and the one before"
    blocks = torch.arange(-(-tokens // BLOCK), device=device)
    seen = ((blocks[:, None] - blocks) // 2 == 0).int()
    order = seen.argsort(stable=True, dim=-1, descending=True).int()
    return BlockMask.from_kv_blocks(
        seen.sum(-1).int()[None, None], order[None, None], BLOCK_SIZE=BLOCK, seq_lengths=(tokens, tokens),
        mask_mod=_in_window,
    )  # fmt: skip


def _flex(i: Inputs) -> tuple[Tensor, Tensor]:
    """y [B, T, H, D] and log_mass [B, T, H] of the window."""
    q, k, v = (x.transpose(1, 2) for x in (i.q_rot, i.k_rot, i.v))
    y, aux = _compiled_flex(
        q, k, v, block_mask=_block_mask(q.shape[2], q.device), enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    return y.transpose(1, 2), aux.lse.transpose(1, 2)


@torch.compile(dynamic=False)
def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_input: Tensor, map_query: Tensor, map_key: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of q and k, v with its column of ones, and the decay, all with all query heads."""

    def features(x: Tensor, weight: Tensor) -> Tensor:
        logits = torch.einsum("bthd,hdf->bthf", x, weight.to(x.dtype))
        return torch.cat([logits.softmax(-1), (-logits).softmax(-1)], -1)

    group = q.shape[2] // k.shape[2]
    features_k = features(k, map_key) * log_input.exp()[..., None].to(k.dtype)
    v = torch.cat([v, torch.ones_like(v[..., :SUMS])], -1)
    features_k, v, log_decay = (x.repeat_interleave(group, 2) for x in (features_k, v, log_decay))
    return features(q, map_query), features_k, v, log_decay


@torch.compile(dynamic=False)
def _normalize(sums: Tensor) -> tuple[Tensor, Tensor]:
    """y and log_mass from numerator and denominator."""
    total = sums[..., -1:]
    return sums[..., :-SUMS] / total, total[..., 0].float().log()


def _fla(i: Inputs) -> tuple[Tensor, Tensor]:
    """y [B, T, H, D] and log_mass [B, T, H] of the linear branch, over all tokens up to the query's."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v, log_decay = _prepare(*(getattr(i, name) for name in LINEAR))
    return _normalize(chunk_simple_gla(q, k, v, g=log_decay, scale=1.0)[0])


@torch.compile(dynamic=False)
def _merge(far: Tensor, far_mass: Tensor, near: Tensor, near_mass: Tensor, log_scale: Tensor) -> Tensor:
    """One denominator for both."""
    share = (far_mass + log_scale - near_mass).sigmoid()[..., None]
    return (share * far + (1 - share) * near).to(near.dtype)


def _flex_window(_: Inputs) -> Function:
    return Function(lambda i: _flex(i)[0], ROTATED)


def _fla_branch(_: Inputs) -> Function:
    import fla.ops.simple_gla  # noqa: F401  says at once if it is not installed

    return Function(lambda i: _fla(i)[0], LINEAR)


def _composed(_: Inputs) -> Function:
    import fla.ops.simple_gla  # noqa: F401

    return Function(lambda i: _merge(*_fla(i), *_flex(i), i.log_scale), BOTH)


def refuses_backward() -> bool:
    """Whether fla refuses its gated backward here: on Hopper with Triton from 3.4 to before 3.7.1."""
    chunk_o: Any = _chunk_o()
    return chunk_o is not None and (
        chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1
    )


def lift_refusal() -> None:
    """For this process, and for timing only: let fla run the backward that it knows to be wrong here."""
    _chunk_o().TRITON_ABOVE_3_7_1 = True


def _chunk_o() -> Any:
    try:
        from fla.ops.common import chunk_o
    except ImportError:
        return None
    return chunk_o


def peers() -> dict[str, Contender]:
    """Each with the formula that it computes: no kept tokens, and a linear branch that sees the window too."""
    note = REFUSAL if refuses_backward() else ""
    if note:
        lift_refusal()
    linear = partial(gated_linear, impl="reference", lag=0, skip=0)
    return {
        "flex window": Contender(_flex_window, partial(window, impl="reference", keep=0)),
        "fla branch": Contender(_fla_branch, linear, note, tunes=True),
        "composed peer": Contender(_composed, partial(composition, keep=0, lag=0), note, tunes=True),
    }
