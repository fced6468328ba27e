"""To the Hub and back: what lies in a published folder, how it goes up whole, and what is checked when it comes down.

Models publish themselves (`model.push_to_hub`, in `adapters/publishing.py`) with what this room knows of folders,
files and cards; it knows no model class.
"""

from lizardzoo.hub.card import Card, check_card, read_card
from lizardzoo.hub.render import write_card
from lizardzoo.hub.upload import Pushed, push_folder

__all__ = ["Card", "Pushed", "check_card", "push_folder", "read_card", "write_card"]
