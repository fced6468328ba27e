"""The one exception for wrong input."""


class LizardzooError(ValueError):
    """Wrong input. Its one sentence names what was given, what was expected and the way out."""
