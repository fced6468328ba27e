"""Text of a teacher's own, sampled by streams: every row of a batch begins a new text as soon as its last one is over.

One step takes the next token of all rows, wherever each of them is in its text, and always does the same: on a CUDA
device it is a graph, and no number comes back to the CPU before a round is over. A round begins texts for a fixed
number of steps and then only ends them, so that long texts are as likely in it as short ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from generation import kv_shape, replayed
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lizardzoo.adapters.masks import CACHE_KEYWORD

ATTENTION = "lizardzoo_streams"
"""For transformers."""
FORCED, ASKED, DONE, CUT, IDLE = -1, -2, -3, -4, -5
"""In a record in place of a token: one of the script's, the end of the first turn, of the text, too long, no text."""
LOOK = 64
"""Steps between looks whether all texts are over."""


class Script(NamedTuple):
    """Tokens that are given: `prefix` before a text, `bridge` between its two turns (empty: it has only one)."""

    prefix: Sequence[int]
    bridge: Sequence[int] = ()


class Written(NamedTuple):
    """A text's tokens by turns; `whole`: it ended by itself."""

    row: int
    turns: list[list[int]]
    whole: bool


class SlotLayer(DynamicLayer):
    """Keys and values [B, Hkv, N, D] of a layer; each row's next token goes into the slot that `place` [B] says."""

    def __init__(self, shape: tuple[int, ...], place: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=place.device) for _ in "kv")
        self.place, self.is_initialized = place, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token a row."""
        slot = self.place[:, None, None, None].expand_as(key_states)
        return self.keys.scatter_(2, slot, key_states), self.values.scatter_(2, slot, value_states)

    def get_seq_length(self) -> int:
        """All slots: which of them count is the mask's business."""
        return self.keys.shape[2]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """One token, q [B, H, 1, D]: the query heads of a group stand in rows, so that keys are not copied for each."""
    rows = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    y = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return y.flatten(1, 2)[:, None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


def draw(logits: Tensor, temperature: float) -> Tensor:
    """A token for each row of [B, V], as the softmax has them; a race of exponentials, which a graph can hold."""
    chances = (logits.float() / temperature).softmax(-1)
    return (chances / torch.empty_like(chances).exponential_()).argmax(-1)


class Streams:
    """A model that writes as many texts at a time as there are scripts; from then on its attention is the one above."""

    def __init__(
        self, model: Any, scripts: Sequence[Script], ends: Sequence[int], *, tokens: int, first_turn: int, steps: int,
        temperature: float = 1.0,
    ) -> None:  # fmt: skip
        """`ends`: the tokens that end a turn; `tokens`: of the longest text, its script included; `first_turn`: of the
        longest turn that another follows; `steps`: in which a round begins texts."""
        model.config._attn_implementation = ATTENTION
        self.model, self.temperature, self.steps = model, temperature, steps
        self.tokens, self.first_turn = tokens, first_turn

        def column(values: Sequence[Any]) -> Tensor:
            return torch.tensor(values, device=model.device)

        given = [[*script.prefix, *script.bridge] for script in scripts]
        longest = max(map(len, given))
        self.script = column([one + [0] * (longest - len(one)) for one in given])
        self.prefix = column([len(script.prefix) for script in scripts])
        self.length = column([len(one) for one in given])
        self.ends = column(sorted(ends))
        self.slots = torch.arange(-(-tokens // 16) * 16, device=model.device)  # as kernels want a mask's rows

        self.token, self.place, self.cursor, self.turn = (torch.zeros_like(self.prefix) for _ in range(4))
        self.live = torch.ones_like(self.prefix, dtype=torch.bool)
        self.closing, self.clock = column([False]), column([0])
        self.record = torch.zeros(steps + tokens + LOOK, len(scripts), dtype=torch.int32, device=model.device)
        shape = (len(scripts), *kv_shape(model, len(self.slots)))
        layers = range(model.config.num_hidden_layers)
        self.cache = Cache(layers=[SlotLayer(shape, self.place, model.dtype) for _ in layers])
        self._run: Any = None

    def round(self, seed: int) -> list[Written]:
        """All texts that are begun in `steps` steps, row by row; the same for the same seed."""
        if self._run is None:
            self._begin()
            self.step()  # what is compiled or loaded at the first step must not be while it is captured
            self._run = replayed(self.step)
        self._begin()
        torch.manual_seed(seed)
        for _ in range(self.steps):
            self._run()
        self.closing.fill_(True)
        while self.live.any():
            for _ in range(LOOK):
                self._run()
        return [
            text for row, codes in enumerate(self.record[: int(self.clock)].T.tolist()) for text in _read(row, codes)
        ]

    def _begin(self) -> None:
        """Before all scripts."""
        for tensor, value in (
            (self.place, 0),
            (self.turn, 0),
            (self.cursor, 1),
            (self.live, True),
            (self.closing, False),
        ):
            tensor.fill_(value)
        self.token.copy_(self.script[:, 0])
        self.clock.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """One token of each row. `token` is read at `place`; the script gives the next one while `cursor` is in it."""
        seen = self.slots <= self.place[:, None]
        logits = self.model(
            self.token[:, None], attention_mask=seen[:, None, None], position_ids=self.place[:, None],
            logits_to_keep=1, **{CACHE_KEYWORD: self.cache},
        ).logits[:, -1]  # fmt: skip
        drawn = draw(logits, self.temperature)

        forced = self.cursor < self._until(self.turn)
        ended = ~forced & (drawn[:, None] == self.ends).any(1)
        asked = ended & (self.turn == 0) & (self.prefix < self.length)
        turn, place = self.turn + asked, self.place + 1
        waits = (turn == 0) & (self.prefix < self.length)  # for the end of a turn that another follows
        cut = ~(ended & ~asked) & ((place >= self.tokens) | (waits & (place >= self.prefix + self.first_turn)))
        over = cut | (ended & ~asked)

        code = torch.where(forced, FORCED, drawn)
        for mark, which in ((ASKED, asked), (DONE, over), (CUT, cut), (IDLE, ~self.live)):
            code = torch.where(which, mark, code)
        self.record.index_copy_(0, self.clock, code[None].to(torch.int32))
        self.clock.add_(1)
        self.live.logical_and_(~(over & self.closing))

        # The next text begins behind its prefix, whose keys are still there: its last token is read once more.
        begins = self.prefix - 1
        cursor = torch.where(over, begins, self.cursor)
        gives = over | (cursor < self._until(turn))
        given = self.script.gather(1, cursor.clamp(max=self.script.shape[1] - 1)[:, None])[:, 0]
        self.token.copy_(torch.where(gives, given, drawn))
        self.cursor.copy_(cursor + gives)
        self.turn.copy_(torch.where(over, 0, turn))
        self.place.copy_(torch.where(over, begins, place))

    def _until(self, turn: Tensor) -> Tensor:
        """Where the script falls silent in a turn."""
        return torch.where(turn == 0, self.prefix, self.length)


def _read(row: int, codes: Sequence[int]) -> Iterator[Written]:
    """The texts of a row's record."""
    turns: list[list[int]] = [[]]
    for code in codes:
        if code >= 0:
            turns[-1].append(code)
        elif code == ASKED:
            turns.append([])
        elif code in (DONE, CUT):
            yield Written(row, turns, code == DONE)
            turns = [[]]
        elif code == IDLE:
            return
