"""threestage: three-stage self-training for semi-supervised semantic segmentation (arXiv 2012.00827).

In Python: `ingest`, `train` and `load`, see threestage/api.py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from threestage.api import ingest, load, train

__all__ = ["IGNORE_INDEX", "__version__", "ingest", "load", "train"]
__version__ = "0.1.0"

IGNORE_INDEX = 255


def __getattr__(name: str) -> Any:
    """Torch is imported when one of the functions is first used."""
    if name in ("ingest", "load", "train"):
        return getattr(import_module("threestage.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
