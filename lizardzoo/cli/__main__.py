"""`python -m lizardzoo.cli`, where no script is installed."""

from lizardzoo.cli import app

app()
