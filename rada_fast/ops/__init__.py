"""Public ops: checks, choice of backend, autograd. One file per op."""

from rada_fast.ops._backend import BACKENDS, backends, resolve_backend, use_backend
from rada_fast.ops.episodic_optimizer import EpisodicOptimizer, episodic_optimizer_step
from rada_fast.ops.prediction_losses import prediction_loss, prediction_loss_and_gradient
from rada_fast.ops.rational_adapter import AdapterOutput, rational_adapter, zero_shot_logits
from rada_fast.ops.view_selection import select_views

__all__ = [
    "BACKENDS",
    "AdapterOutput",
    "EpisodicOptimizer",
    "backends",
    "episodic_optimizer_step",
    "prediction_loss",
    "prediction_loss_and_gradient",
    "rational_adapter",
    "resolve_backend",
    "select_views",
    "use_backend",
    "zero_shot_logits",
]
