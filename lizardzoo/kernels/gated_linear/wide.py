"""Gated linear attention wider than a kernel's tiles: in slabs, each a call of its own.

A kernel takes a map and a half of the state whole. Beyond that its function is put together of narrower ones:

- columns of the values are independent of each other: each slab computes the weights anew;
- a wide head_dim only enters through the logits z = x W, which are then made by PyTorch, behind the identity as map;
- features beyond what fits add up, numerators and denominators: slabs of log-features, each a branch of its own under
  one denominator. A softmax over features is inside its logarithms by then, and so they are made by PyTorch, in fp32.

Here logits, or log-features, reach memory, as they do nowhere else. Gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lizardzoo.kernels.features import log_features, logits
from lizardzoo.kernels.gated_linear.launch import Inputs
from lizardzoo.kernels.merge import joint

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""y, log_mass, and the last memory: kv, norm, scale."""


def in_slabs(compute: Callable[..., Sequence[Tensor]], inputs: Inputs, widest: Callable[[Tensor], int]) -> Outputs:
    """What `compute` would give for these inputs, by calls whose sizes are at most the `widest` for a q."""
    dtype, most = inputs.q.dtype, widest(inputs.q)
    if inputs.query_map is not None and inputs.query_map.shape[2] > most:
        inputs = _of_log_features(inputs)
    elif inputs.query_map is not None and inputs.q.shape[3] > most:
        inputs = _of_logits(inputs)
    if inputs.query_map is not None or inputs.q.shape[3] <= most:
        return _by_values(compute, inputs, most)
    inputs = inputs._replace(q=inputs.q.float(), k=inputs.k.float(), v=inputs.v.float())
    most = widest(inputs.q)
    slabs = [_by_values(compute, _features_of(inputs, part), most) for part in _parts(inputs.q.shape[3], most)]
    y, log_mass = joint([slab[:2] for slab in slabs])
    kv, norm, scale = (torch.cat([slab[place] for slab in slabs], 2) for place in (2, 3, 4))
    return y.to(dtype), log_mass, kv, norm, scale


def _by_values(compute: Callable[..., Sequence[Tensor]], inputs: Inputs, most: int) -> Outputs:
    """Slabs of the values and of the memory's columns; all have the same denominator and the same norm."""
    kv = inputs.kv
    slabs = [
        compute(*inputs._replace(v=inputs.v[..., part], kv=None if kv is None else kv[..., part]))
        for part in _parts(inputs.v.shape[3], most)
    ]
    y, last = (torch.cat([slab[place] for slab in slabs], -1) for place in (0, 2))
    return y, slabs[0][1], last, slabs[0][3], slabs[0][4]


def _of_logits(inputs: Inputs) -> Inputs:
    """The same of queries and keys that are their logits, in their dtype, as products of it give them."""
    assert inputs.query_map is not None and inputs.key_map is not None
    same = torch.eye(inputs.query_map.shape[2], device=inputs.q.device)[None]
    q, k = (logits(x, w.to(x.dtype)) for x, w in ((inputs.q, inputs.query_map), (inputs.k, inputs.key_map)))
    return inputs._replace(q=q, k=k, query_map=same, key_map=same)


def _of_log_features(inputs: Inputs) -> Inputs:
    """The same of queries and keys that are their log-features."""
    assert inputs.query_map is not None and inputs.key_map is not None
    q, k = (
        log_features(x, weight, inputs.activation)  # type: ignore[arg-type]
        for x, weight in ((inputs.q, inputs.query_map), (inputs.k, inputs.key_map))
    )
    return inputs._replace(q=q, k=k, query_map=None, key_map=None, activation="none")


def _features_of(inputs: Inputs, part: slice) -> Inputs:
    """A slab of the features, and of the memory's rows."""
    memory = [None if x is None else x[:, :, part] for x in (inputs.kv, inputs.norm, inputs.scale)]
    return inputs._replace(q=inputs.q[..., part], k=inputs.k[..., part], kv=memory[0], norm=memory[1], scale=memory[2])


def _parts(size: int, most: int) -> list[slice]:
    return [slice(start, min(start + most, size)) for start in range(0, size, most)]
