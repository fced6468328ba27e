"""The baseline that a linear branch has to beat: a bare window with as many bytes of state."""

from __future__ import annotations

from transformers import PreTrainedModel

from lizardzoo.cache import state_bytes
from lizardzoo.config import MixerSpec
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import mixers_of
from lizardzoo.kernels.state import state_tensors
from lizardzoo.mixers.branches import MAX_SIZE
from lizardzoo.mixers.softmax import Softmax
from lizardzoo.mixers.window import Window


def state_matched_window(model: PreTrainedModel, keep: int = 4) -> int:
    """The window size with which a bare window (and `keep` kept tokens) has the state bytes of the student.

    One size for all layers that have a mixer; of all sizes the one whose bytes come nearest.

    Args:
        model: the student.
        keep: tokens that the bare window keeps.

    Returns:
        The window, in tokens.

    Raises:
        LizardzooError: a model without mixers, or one whose state is below that of a window of 1.
    """
    shapes = [mixer.shape for mixer in mixers_of(model).values()]
    if not shapes:
        raise LizardzooError(f"{type(model).__name__} has no mixer, so no state to match; give a linearized model")

    def window_bytes(window: int) -> int:
        spec = Window(window=window, keep=keep)
        sizes = {}
        for shape in set(shapes):
            state = spec.build(shape).init_state(1, model.dtype, "meta")
            sizes[shape] = sum(x.nbytes for x in {id(x): x for x in state_tensors(state)}.values())
        return sum(sizes[shape] for shape in shapes)

    wanted = state_bytes(model)
    if wanted < window_bytes(1):
        raise LizardzooError(
            f"the model's state has {wanted:,} bytes, less than a window of 1 with {keep} kept tokens; "
            f"pass a smaller keep"
        )
    low, high = 1, MAX_SIZE  # bytes(low) <= wanted < bytes(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if window_bytes(middle) <= wanted else (low, middle)
    return low if wanted - window_bytes(low) <= window_bytes(high) - wanted else high


def matched_layers(model: PreTrainedModel, keep: int = 4) -> list[MixerSpec]:
    """The layers list of that baseline: `lizardzoo.linearize(teacher, matched_layers(student))` makes it.

    Layers that keep their softmax in the student keep it here too.

    Args:
        model: the student.
        keep: tokens that the bare window keeps.

    Raises:
        LizardzooError: as `state_matched_window`.
    """
    window = Window(window=state_matched_window(model, keep), keep=keep)
    mixers = mixers_of(model)
    return [window if index in mixers else Softmax() for index in range(model.config.num_hidden_layers)]
