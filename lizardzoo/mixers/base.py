"""The mixer: a module that turns q, k, v and the layer's input into the attention output, with its own state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lizardzoo.config import MixerSpec
from lizardzoo.errors import LizardzooError
from lizardzoo.kernels import Impl, WindowState, rotate
from lizardzoo.kernels.state import overwrite
from lizardzoo.mixers.merge import Branch


@dataclass(frozen=True)
class AttentionShape:
    """What a mixer must know of the attention it replaces.

    Attributes:
        hidden_size: width of the layer's input x.
        heads: query heads H.
        kv_heads: key and value heads Hkv; H is a multiple of it.
        head_dim: D, even (RoPE).
        scale: of the softmax scores.

    Raises:
        LizardzooError: heads that kv_heads does not divide, an odd head_dim.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise LizardzooError(
                f"the model has {self.heads} query heads and {self.kv_heads} key heads; a mixer needs the first to be "
                f"a multiple of the second: check num_attention_heads and num_key_value_heads in its config"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise LizardzooError(
                f"the model has head_dim {self.head_dim}; RoPE needs an even number: check head_dim in its config"
            )


class Turns(NamedTuple):
    """By how much the kept keys are turned for each token (`lizardzoo.mixers.far`): cos, sin [B, T, D] fp32.

    cuts: the tokens, apart from the first, before which some row's turn changes.
    """

    cos: Tensor
    sin: Tensor
    cuts: tuple[int, ...] = ()


class MixerInputs(NamedTuple):
    """One call's inputs.

    Attributes:
        q: [B, T, H, D], projected and normed, BEFORE RoPE; in the model's dtype, as k, v and x are.
        k: [B, T, Hkv, D], likewise.
        v: [B, T, Hkv, D].
        x: [B, T, hidden], the layer's input.
        cos: [B or 1, T, D], of RoPE.
        sin: [B or 1, T, D], of RoPE.
        mask: [B, T] bool, True = real token; None = all real.
        starts: [B, T] bool, True where a packed document begins; None = none.
        turns: for texts beyond the teacher's positions; see `lizardzoo.mixers.far` and `Mixer.turns_steps`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    starts: Tensor | None = None
    turns: Turns | None = None

    @property
    def turn(self) -> tuple[Tensor, Tensor] | None:
        """Of a single token, as the kernels' steps take it: cos and sin [B, 1, D]."""
        return None if self.turns is None else self.turns[:2]

    def each(self, fn: Callable[[Tensor], Tensor]) -> MixerInputs:
        """`fn` of every tensor that is there."""
        values: list[Any] = [x if x is None else fn(x) for x in self[:-1]]
        values.append(self.turns and self.turns._replace(cos=fn(self.turns.cos), sin=fn(self.turns.sin)))
        return MixerInputs(*values)

    def tokens(self, start: int, end: int) -> MixerInputs:
        """The same for the tokens start .. end-1."""
        part = self.each(lambda x: x[:, start:end])
        if self.turns is None or part.turns is None:
            return part
        cuts = tuple(cut - start for cut in self.turns.cuts if start < cut < end)
        return part._replace(turns=part.turns._replace(cuts=cuts))

    def rotated(self, impl: Impl = Impl.AUTO) -> tuple[Tensor, Tensor]:
        """q and k after RoPE."""
        return rotate(self.q, self.k, self.cos, self.sin, impl)


class Mixer(nn.Module):
    """Base of all mixers. A subclass names its branches, computes them, and says how they merge.

    Parameters live in fp32 whatever the model's dtype: bf16 swallows the small updates of gates and scales without a
    sign (casting a model to bf16 moves this module's device only). Modules are built on the meta device by
    transformers, so values are given in `reset_parameters`, never in `__init__`.
    """

    branch_names: ClassVar[tuple[str, ...]] = ()
    turns_steps: ClassVar[bool] = False
    """Whether behind a state it hands a single token's `inputs.turn` on to `window_attention_step` or the like. Else no
    `turns` reach it: kept keys are turned around it (`lizardzoo.mixers.far`), which costs a step a few launches."""

    def __init__(self, spec: MixerSpec, shape: AttentionShape) -> None:
        super().__init__()
        self.spec: Any = spec
        self.shape = shape
        self.impl = Impl.AUTO
        self.switched_off: set[str] = set()
        """Branches that add nothing to the output (for ablations); their state still advances."""

    @property
    def kernels(self) -> dict[str, tuple[int, ...]]:
        """The ops of `lizardzoo.kernels` that it calls, by name, with the dims that their Triton kernels must take."""
        return {}

    def branches(
        self, inputs: MixerInputs, state: Any | None, need_state: bool
    ) -> tuple[dict[str, Branch], Any | None]:
        """Each branch by name, and the next state (None unless needed).

        Args:
            inputs: of T tokens.
            state: of the tokens before them; None: there are none.
            need_state: whether anything follows.
        """
        raise NotImplementedError

    def merge(self, branches: dict[str, Branch], x: Tensor) -> Tensor:
        """The output [B, T, H, D] from the branches that are switched on (at least one)."""
        (branch,) = branches.values()
        return branch.y

    def shares(self, branches: dict[str, Branch], x: Tensor) -> dict[str, Tensor]:
        """Each branch's part of the output [B, T, H], together 1: by the norms of what each gives alone."""
        norms = {}
        for name, branch in branches.items():
            y = self.merge({name: branch}, x)
            norms[name] = y.to(torch.promote_types(y.dtype, torch.float32)).norm(dim=-1)
        total = torch.stack(list(norms.values())).sum(0).clamp_min(torch.finfo(torch.float32).tiny)
        return {name: norm / total for name, norm in norms.items()}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> Any:
        """The state before the first token: a (nested) NamedTuple of tensors [batch, ...] whose size never changes.

        dtype is the model's: keys and values wait in it, what is accumulated is fp32.
        """
        raise NotImplementedError

    def window_state(self, state: Any | None) -> WindowState | None:
        """The part of a state that holds a window's rotated keys; None: there is none, or the keys are not rotated."""
        return None

    def with_window(self, state: Any, window: WindowState) -> Any:
        """The state with another such part."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Give all own parameters their start values."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs) -> None:
        """Set start values from the teacher's own q, k, v on a piece of text, where the mixer has something to set."""

    def forward(
        self, inputs: MixerInputs, state: Any | None = None, need_state: bool = False
    ) -> tuple[Tensor, Any | None]:
        """y [B, T, H, D] in q's dtype, and the next state."""
        branches, state = self.branches(inputs, state, need_state)
        return self.output(branches, inputs), state

    @torch.no_grad()
    def step_(self, inputs: MixerInputs, state: Any) -> Tensor:
        """y of one token (T = 1), without gradients; the tensors of `state` are overwritten with those of the next."""
        y, new = self.forward(inputs, state, need_state=True)
        overwrite(state, new)
        return y

    def output(self, branches: dict[str, Branch], inputs: MixerInputs) -> Tensor:
        """What is switched on, merged; y [B, T, H, D] in q's dtype."""
        on = {name: branch for name, branch in branches.items() if name not in self.switched_off}
        y = self.merge(on, inputs.x) if on else torch.zeros_like(inputs.q)
        if inputs.mask is not None:
            y = torch.where(inputs.mask[..., None, None], y, 0.0)  # x, and so the merge, may be anything there
        return y.to(inputs.q.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mixer:
        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = tensor.is_floating_point() and moved.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(moved.device) if narrowed else moved

        return super()._apply(wide, recurse)


@torch.no_grad()
def start_value(parameter: nn.Parameter, value: Tensor | float) -> None:
    """Give a new parameter its start value, unless transformers has just loaded it from a checkpoint.

    Args:
        parameter: of a mixer; one on the meta device is left alone (its values come later).
        value: a number, or a tensor that expands to the parameter's shape.
    """
    if not getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta:
        parameter.copy_(torch.as_tensor(value, dtype=parameter.dtype, device=parameter.device).expand_as(parameter))
