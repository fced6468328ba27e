"""The command line: `lizardzoo list | info | linearize | distill | eval | generate`."""

from lizardzoo.cli import make, measure, show, use  # noqa: F401  each adds its commands to the app
from lizardzoo.cli.base import app

__all__ = ["app"]
