"""The command line: `lizardzoo list | info | linearize | distill | eval | diagnose | card | push | ...`."""

from lizardzoo.cli import advise, make, measure, publish, show, use  # noqa: F401  each adds its commands to the app
from lizardzoo.cli.base import app

__all__ = ["app"]
