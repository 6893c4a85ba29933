"""The public ops. Each has a file that checks the arguments, chooses a backend and connects autograd."""

from rada_fast.ops._backends.choice import BACKENDS, backends, resolve_backend, use_backend
from rada_fast.ops._backends.transforms import under_transform
from rada_fast.ops._views import CROP_SCALE, VIEW_COLUMNS
from rada_fast.ops.augmix import AugmixPlan, augmix, random_augmix
from rada_fast.ops.encoder_attention import encoder_attention
from rada_fast.ops.episodic_optimizer import EpisodicOptimizer, episodic_optimizer_step
from rada_fast.ops.multi_view_crops import (
    multi_view_crops,
    random_views,
    whole_view,
)
from rada_fast.ops.prediction_losses import prediction_loss, prediction_loss_and_gradient
from rada_fast.ops.prepared_adapter import PreparedAdapter
from rada_fast.ops.rational_adapter import (
    AdapterOutput,
    rational_adapter,
    serving_backend,
    zero_shot_logits,
)
from rada_fast.ops.view_selection import KeptViews, gather_views, keep_views, select_views

__all__ = [
    "BACKENDS",
    "CROP_SCALE",
    "VIEW_COLUMNS",
    "AdapterOutput",
    "AugmixPlan",
    "EpisodicOptimizer",
    "KeptViews",
    "PreparedAdapter",
    "augmix",
    "backends",
    "encoder_attention",
    "episodic_optimizer_step",
    "gather_views",
    "keep_views",
    "multi_view_crops",
    "prediction_loss",
    "prediction_loss_and_gradient",
    "random_augmix",
    "random_views",
    "rational_adapter",
    "resolve_backend",
    "select_views",
    "serving_backend",
    "under_transform",
    "use_backend",
    "whole_view",
    "zero_shot_logits",
]
