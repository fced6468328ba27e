"""What tests and plug-in authors share: oracles, strategies, and the laws every mixer and every model obeys.

Needs the `test` extra, but no test runner.
"""

from lizardzoo.testing.conformance import MODEL_LAWS, Case, check_model, check_model_law, tiny_teacher
from lizardzoo.testing.laws import LAWS, check_law, check_mixer, random_mixer
from lizardzoo.testing.oracles import gated_linear_oracle, heavy_oracle, hybrid_oracle, visible_pairs, window_oracle
from lizardzoo.testing.strategies import layer_lists, mixer_inputs, specs, token_flags

__all__ = [
    "LAWS",
    "MODEL_LAWS",
    "Case",
    "check_law",
    "check_mixer",
    "check_model",
    "check_model_law",
    "gated_linear_oracle",
    "heavy_oracle",
    "hybrid_oracle",
    "layer_lists",
    "mixer_inputs",
    "random_mixer",
    "specs",
    "tiny_teacher",
    "token_flags",
    "visible_pairs",
    "window_oracle",
]
