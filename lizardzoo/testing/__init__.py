"""What tests and plug-in authors share: oracles, strategies, and the laws every mixer obeys. Needs the `test` extra."""

from lizardzoo.testing.laws import LAWS, check_law, check_mixer, random_mixer
from lizardzoo.testing.oracles import gated_linear_oracle, hybrid_oracle, visible_pairs, window_oracle
from lizardzoo.testing.strategies import mixer_inputs, specs, token_flags

__all__ = [
    "LAWS",
    "check_law",
    "check_mixer",
    "gated_linear_oracle",
    "hybrid_oracle",
    "mixer_inputs",
    "random_mixer",
    "specs",
    "token_flags",
    "visible_pairs",
    "window_oracle",
]
