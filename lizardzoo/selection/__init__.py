"""Per-layer hybrids chosen by measurement: which layers keep softmax, and how wide each layer's window is."""

from lizardzoo.selection.layers import Selection, Worth, select_layers
from lizardzoo.selection.windows import WindowSelection, select_windows

__all__ = ["Selection", "WindowSelection", "Worth", "select_layers", "select_windows"]
