"""Rational Adaptation (RAda, arXiv:2507.15480) of vision-language models, made fast.

The public names load on first use, so that ``import rada_fast`` and the command line's help answer at once.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rada_fast._version import __version__

if TYPE_CHECKING:
    from rada_fast import compat, ops
    from rada_fast.config.method import AdapterConfig, EpisodeConfig
    from rada_fast.engine.episodes import adapt_episodes
    from rada_fast.engine.fine_tuning import FineTuned, fine_tune
    from rada_fast.engine.predictor import Prediction, TestTimePredictor
    from rada_fast.errors import BackendUnavailableError, UserError
    from rada_fast.modules import RationalAdapter, load_adapter, save_adapter
    from rada_fast.ops import backends, use_backend

# In a checkout that was not installed, the Triton kernels are beside the package instead of inside it.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[1]))

_MODULES = {
    "AdapterConfig": "config.method",
    "EpisodeConfig": "config.method",
    "RationalAdapter": "modules",
    "load_adapter": "modules",
    "save_adapter": "modules",
    "adapt_episodes": "engine.episodes",
    "TestTimePredictor": "engine.predictor",
    "Prediction": "engine.predictor",
    "FineTuned": "engine.fine_tuning",
    "fine_tune": "engine.fine_tuning",
    "backends": "ops",
    "use_backend": "ops",
    "UserError": "errors",
    "BackendUnavailableError": "errors",
}
_ROOMS = ("compat", "ops")
"""Modules whose names are public under the module's own, as in rada_fast.ops.select_views."""

__all__ = [
    "AdapterConfig",
    "BackendUnavailableError",
    "EpisodeConfig",
    "FineTuned",
    "Prediction",
    "RationalAdapter",
    "TestTimePredictor",
    "UserError",
    "__version__",
    "adapt_episodes",
    "backends",
    "compat",
    "fine_tune",
    "load_adapter",
    "ops",
    "save_adapter",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f"rada_fast.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"rada_fast.{name}")
    raise AttributeError(f"module 'rada_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
