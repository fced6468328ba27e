"""The stub: the one small Python file in a published folder, for loading with trust_remote_code=True."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

STUB = "modeling_lizardzoo.py"
TEMPLATE = '''"""Loads this model with trust_remote_code=True. It needs the package: pip install {package}

After `import {package}` the model loads without trust_remote_code, and this file is not used.
"""

from {module} import {names}

__all__ = [{quoted}]
'''


def write_stub(folder: str | Path, classes: Iterable[type]) -> None:
    """Write the stub that imports these classes, all of one module, from where they are installed."""
    classes = list(classes)
    module, names = classes[0].__module__, [cls.__name__ for cls in classes]
    text = TEMPLATE.format(
        package=module.partition(".")[0],
        module=module,
        names=", ".join(sorted(names)),  # as import sorters have it, of whoever keeps such a folder in a repository
        quoted=", ".join(f'"{name}"' for name in names),
    )
    (Path(folder) / STUB).write_text(text, encoding="utf-8")


def auto_map(config: type, base: type, causal_lm: type) -> dict[str, str]:
    """What config.json says of the stub."""
    classes = {"AutoConfig": config, "AutoModel": base, "AutoModelForCausalLM": causal_lm}
    return {auto: f"{STUB.removesuffix('.py')}.{cls.__name__}" for auto, cls in classes.items()}
