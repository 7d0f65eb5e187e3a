"""Data, models, training, pruning and quantization; each module is loaded when it is first used."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.compression import budget, data, distributed, models, pruning, qat, quantization, sources, training

__all__ = ["budget", "data", "distributed", "models", "pruning", "qat", "quantization", "sources", "training"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(name)
