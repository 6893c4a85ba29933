"""The modules that own an adapter's parameters, and their checkpoints."""

from rada_fast.modules.checkpoint import load_adapter, save_adapter
from rada_fast.modules.rational_adapter import RationalAdapter

__all__ = ["RationalAdapter", "load_adapter", "save_adapter"]
