"""The Hugging Face cache layer that holds a mixer's state, and what states and KV caches cost in bytes.

`DynamicCache(config=model.config)` makes one `MixerCacheLayer` for every layer whose `layer_types` entry is
`MIXER_LAYER_TYPE`, `StaticCache` a `StaticMixerCacheLayer`, so `generate` needs no override. Both report the mask sizes
of full attention: transformers sizes the one causal mask of kept softmax layers by the first layer that is not sliding,
which may be a mixer's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels.state import map_state, overwrite, state_tensors
from lizardzoo.mixers import far
from lizardzoo.mixers.base import Mixer, MixerInputs

MIXER_LAYER_TYPE = "lizardzoo_mixer"
SLIDING_MIXER_LAYER_TYPE = "lizardzoo_mixer_sliding"
"""The same in a layer whose teacher has a sliding window of its own: there softmax_mode needs that mask."""


class _Record(NamedTuple):
    """One call, to be undone: the state before it, and what is needed to run part of it again."""

    state: Any
    inputs: MixerInputs
    mixer: Mixer
    tokens: int


class MixerCacheLayer(CacheLayerMixin):
    """Holds one layer's state; its size does not depend on how many tokens have been seen."""

    _layer_type: str | None = MIXER_LAYER_TYPE
    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.state: Any = None
        self.cumulative_length = 0
        self.record_past = False
        self._records: list[_Record] = []

    def advance(self, mixer: Mixer, inputs: MixerInputs) -> Tensor:
        """Run the mixer behind the held state, and hold the next one; returns y [B, T, H, D] in q's dtype."""
        count = inputs.q.shape[1]
        # Of a prompt a mixer makes its first state in fewer operations than it takes to go on from an empty one.
        if self.state is None and (count == 1 or self.record_past or torch.compiler.is_compiling()):
            self._hold(mixer.init_state(inputs.q.shape[0], inputs.v.dtype, inputs.v.device))
        if self.record_past:
            self._records.append(_Record(self._past(), inputs, mixer, count))
        if count == 1 and self._may_overwrite():
            y = far.step_(mixer, inputs, self.state)
        else:
            y, new = far.run(mixer, inputs, self.state, need_state=True)
            self._hold(new)
        self.cumulative_length += count
        self.is_initialized = True
        return y

    def _hold(self, state: Any) -> None:
        """Go on from this state."""
        self.state = state

    def _past(self) -> Any:
        """The state as a record may keep it."""
        return self.state

    def _may_overwrite(self) -> bool:
        """Whether a step may take place in the held state: nothing else needs it, neither a record nor a gradient."""
        if self.record_past or torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling():  # which knows no inference mode; the overwriting itself would raise
            return True
        return torch.is_inference_mode_enabled() or not any(x.is_inference() for x in state_tensors(self.state))

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last |tokens_to_remove| tokens: go back to a recorded state and replay what is kept.

        Raises:
            LizardzooError: more tokens than were recorded.
        """
        remove = abs(int(tokens_to_remove))
        records, self._records = self._records, []
        if remove == 0:
            return
        if remove >= self.cumulative_length:
            self.reset()
            return
        if remove > sum(record.tokens for record in records):
            raise LizardzooError(
                f"cannot remove {remove} tokens from a mixer's cache: its state does not hold the past; call "
                f"cache.activate_past_recording() before the tokens that may be undone"
            )
        while remove > 0:
            record = records.pop()
            self._hold(record.state)
            self.cumulative_length -= record.tokens
            if kept := max(record.tokens - remove, 0):
                self.advance_silently(record.mixer, record.inputs.tokens(0, kept))
            remove -= record.tokens

    def advance_silently(self, mixer: Mixer, inputs: MixerInputs) -> None:
        """`advance` without a record of it."""
        recording, self.record_past = self.record_past, False
        self.advance(mixer, inputs)
        self.record_past = recording

    def activate_past_recording(self) -> None:
        """From now on keep what is needed to undo calls, until the next `crop`."""
        self.record_past = True

    def reset(self) -> None:
        """Back to before the first token."""
        self.state = None
        self.is_initialized = False
        self.cumulative_length = 0
        self._records = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b continues what row beam_idx[b] held."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Nothing: a state has its one size, which is small beside what kept softmax layers hold. It stays."""

    def prefetch(self) -> None:
        """Nothing: it is there."""

    def get_seq_length(self) -> int:
        """Tokens seen, padded ones included."""
        return self.cumulative_length

    def most_seen(self) -> int:
        """No more tokens than so many have been seen."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As for full attention."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (the name before transformers 5.18)."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `advance` asks the mixer for its first state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """A mixer's layer has no keys and values to update."""
        raise LizardzooError(
            "a mixer's cache layer has no key-value store; its mixer calls advance() instead of update()"
        )

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._hold(map_state(fn, self.state))
        self._records = []


class SlidingMixerCacheLayer(MixerCacheLayer):
    """The same under the other layer type."""

    _layer_type = SLIDING_MIXER_LAYER_TYPE


class StaticMixerCacheLayer(MixerCacheLayer):
    """What a StaticCache holds: tensors that stay where they are, the length too, so that a compiled step is replayed.

    The state has its one size in any case; `max_cache_len` is what kept softmax layers have room for.
    """

    _layer_type = None  # transformers takes a name for that of a dynamic layer
    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.cumulative_length: Any = torch.tensor(0)

    def _hold(self, state: Any) -> None:
        held, new = (list(state_tensors(x)) for x in (self.state, state))
        if [x.shape for x in held] == [x.shape for x in new]:
            overwrite(self.state, state)
            return
        self.state = state
        self.cumulative_length = self.cumulative_length.to(new[0].device)
        if not torch.compiler.is_compiling():
            for tensor in (*new, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def _past(self) -> Any:
        return map_state(torch.clone, self.state)

    def _may_overwrite(self) -> bool:
        return not torch.is_grad_enabled()

    def reset(self) -> None:
        """Back to before the first token."""
        super().reset()
        self.cumulative_length = torch.tensor(0)

    def most_seen(self) -> int:
        """What it has room for: the number itself is on the device."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As for full attention."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """Tokens that the kept softmax layers beside it have room for."""
        return self.max_cache_len

    def get_max_cache_shape(self) -> int:
        """The same (the name before transformers 5.18)."""
        return self.max_cache_len


for _layer_type in (MIXER_LAYER_TYPE, SLIDING_MIXER_LAYER_TYPE):
    STATIC_LAYER_TYPE_MAPPING[_layer_type] = StaticMixerCacheLayer


def prefetch_next(cache: Cache, layer_index: int, device: torch.device) -> None:
    """Before a mixer's layer, what `Cache.update` does before a softmax layer: have the next one's keys brought back.

    An offloaded cache hands on from layer to layer, and a mixer's layer goes by `advance` instead of `update`.
    """
    if cache.offloading:
        cache.prefetch_stream.wait_stream(torch.cuda.default_stream(device))  # the copies to the CPU are made there
        cache.prefetch(layer_index + 1, cache.only_non_sliding)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds; storage held twice counts once.

    Args:
        cache: of a linearized model or of a teacher, at any time.
    """
    tensors: list[Tensor] = []
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            tensors += state_tensors(layer.state)
        else:
            tensors += [x for x in (layer.keys, layer.values) if isinstance(x, Tensor)]
    return _bytes(tensors)


def state_bytes(model: Any, batch: int = 1) -> int:
    """Bytes of a linearized model's mixer states for sequences of any length, from their shapes alone.

    Args:
        model: linearized; its weights may be on the meta device.
        batch: sequences.
    """
    tensors = []
    for mixer in model.mixers().values():
        tensors += list(state_tensors(mixer.init_state(batch, model.dtype, "meta")))
    return sum(x.nbytes for x in {id(x): x for x in tensors}.values())


def kv_bytes(model: Any, length: int, batch: int = 1) -> int:
    """Bytes of the key-value cache of the softmax layers of a model (all layers of a teacher).

    A layer with transformers' own sliding window holds that many tokens at most.

    Args:
        model: linearized or not; its weights may be on the meta device.
        length: tokens of each sequence.
        batch: sequences.
    """
    config = model.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # as DynamicCache reads such a config
        kinds = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    held = dict.fromkeys((MIXER_LAYER_TYPE, SLIDING_MIXER_LAYER_TYPE), 0)
    if window is not None:
        held["sliding_attention"] = min(length, window)
    tokens = sum(held.get(kind, length) for kind in kinds)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * tokens * batch * config.num_key_value_heads * head_dim * model.dtype.itemsize


def _bytes(tensors: list[Tensor]) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.numel()}
    return sum(storages.values())
