"""Learn and reproduce self-supervised 3D hand reconstruction, notebook by notebook."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from torch import nn

    from .camera import project
    from .conventions import Observation, Truth
    from .mano import HandMesh, HandModel
    from .mano_files import load_mano

__version__ = "0.1.0"
__all__ = ["HandMesh", "HandModel", "Observation", "Truth", "__version__", "load", "load_mano", "project"]
_HOME = {"project": "camera", "Observation": "conventions", "Truth": "conventions", "HandMesh": "mano", "HandModel": "mano", "load_mano": "mano_files"}


def load(source: str | os.PathLike[str] = "s2hand", **options: Any) -> nn.Module:
    "A trained network: a system's name, for the one that travels with the package, or a checkpoint file of any system."
    from importlib import import_module          # here, so that `import handrecon` stays light

    from handrecon.runs import SYSTEMS
    from handrecon.training import load_checkpoint
    system = str(source) if str(source) in SYSTEMS else load_checkpoint(source).meta["system"]
    return import_module(f"handrecon.{system}").load(source, **options)


def __getattr__(name: str) -> Any:
    "The names above and the modules, imported when they are first asked for."
    from importlib import import_module
    from importlib.util import find_spec
    if name in _HOME: return getattr(import_module(f"handrecon.{_HOME[name]}"), name)
    if name.startswith("_") or find_spec(f"handrecon.{name}") is None: raise AttributeError(f"module 'handrecon' has no attribute {name!r}")
    return import_module(f"handrecon.{name}")


def __dir__() -> list[str]:
    from pkgutil import iter_modules
    return sorted({*__all__, *(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))})
