"""Methods that learn prompts: TPT, and MaPLe in test-time training and in efficient fine-tuning.

The prompts themselves are models.encoder_tuning's, which `eft` trains too. Gradients pass through the text encoder
and, in MaPLe, through the image encoder.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW

from rada_fast.bench.baselines.published import Encode
from rada_fast.bench.baselines.training_free import most_confident
from rada_fast.config.methods import TuningName
from rada_fast.config.options import TuningOptions
from rada_fast.models.encoder_tuning import EncoderTuning
from rada_fast.models.vision_language import VisionLanguageModel

TPT_TOKENS, MAPLE_TOKENS = 4, 2
"""The learned words of TPT and of MaPLe, whose prompts start as "a photo of a" and "a photo" (published code)."""
TEST_TIME_DEPTH, TRAINING_DEPTH = 3, 9
"""The blocks of both encoders with MaPLe's prompts: in test-time training (as with PromptAlign), and base to new."""
TEST_TIME_LR, TRAINING_LR, MOMENTUM = 5e-3, 3.5e-3, 0.9
"""AdamW's learning rate in TPT; SGD's, and its momentum, in MaPLe's training (published code)."""

FIRST_LOSS_SCALE = 1000.0
"""The factor of the loss in float16 (TPT's published code)."""


class PromptEpisodes:
    """Adapt prompts to each picture by one step of AdamW on the entropy of the confident views' mean prediction.

    This is TPT (Shu et al., NeurIPS 2022, arXiv:2209.07511), which learns the words before the name, and MaPLe
    (Khattak et al., CVPR 2023, arXiv:2210.03117) in its loop, which learns deep prompts of both encoders. The prompts
    and the optimiser are put back before each picture. The original is encoded once more for the prediction, and all
    prompts too.

    vlm: the model; names: the names of the classes; template: the prompt that the context starts as.
    tuning: "context" for TPT, "coupled-prompts" for MaPLe. MaPLe's deep prompts start at random, as before its
        training; its published accuracy is that of prompts that were trained on ImageNet.
    """

    def __init__(
        self, vlm: VisionLanguageModel, names: Sequence[str], template: str, tuning: TuningName, *, seed: int = 0
    ) -> None:
        tokens = TPT_TOKENS if tuning == "context" else MAPLE_TOKENS
        options = TuningOptions(context_tokens=tokens, prompt_depth=TEST_TIME_DEPTH)
        self._vlm, self._selection = vlm, 0.1
        self.tuning = EncoderTuning(tuning, vlm, template, options, seed)
        self._tokens = self.tuning.tokens_of(names)
        self._optimizer = AdamW(self.tuning.parameters(), lr=TEST_TIME_LR)
        self._initial_optimizer = copy.deepcopy(self._optimizer.state_dict())
        self.start_here()

    def start_here(self) -> None:
        """Let every picture start with the prompts as they are now."""
        self._initial = copy.deepcopy(self.tuning.state_dict())

    def __call__(self, views: Tensor, encode: Encode) -> Tensor:
        """Return the logits (K,) of the original. views: (V, 3, S, S), the original first.

        encode: the image encoder, for prompts that leave it as it is.
        """
        self.tuning.load_state_dict(self._initial)
        self._optimizer.load_state_dict(self._initial_optimizer)
        logits = self._logits(views, encode)  # (V, K)
        kept = logits[most_confident(logits.detach(), self._selection)]  # (n, K)
        self._optimizer.zero_grad()
        scaler = _scaler(self._vlm)
        scaler.scale(marginal_entropy(kept)).backward()
        scaler.step(self._optimizer)
        return self.predict(views[:1], encode)[0]

    @torch.no_grad()
    def predict(self, views: Tensor, encode: Encode) -> Tensor:
        """Compute the logits (V, K) of views with the prompts as they are now."""
        return self._logits(views, encode)

    def _logits(self, views: Tensor, encode: Encode) -> Tensor:
        with self.tuning.attached():
            text = self._vlm.text_features_with_grad(self._tokens)
            if self.tuning.changes_images:
                features = self._vlm.image_features_with_grad(views)
            else:
                with torch.no_grad():
                    features = encode(views)
        return self._vlm.logit_scale * features @ text.T


class PromptTraining:
    """Take training iterations of MaPLe on batches of images, as its published code does, with SGD.

    The arguments are those of PromptEpisodes.
    """

    def __init__(self, vlm: VisionLanguageModel, names: Sequence[str], template: str, *, seed: int = 0) -> None:
        options = TuningOptions(context_tokens=MAPLE_TOKENS, prompt_depth=TRAINING_DEPTH)
        self._vlm = vlm
        self.tuning = EncoderTuning("coupled-prompts", vlm, template, options, seed)
        self._tokens = self.tuning.tokens_of(names)
        self._optimizer = SGD(self.tuning.parameters(), lr=TRAINING_LR, momentum=MOMENTUM, weight_decay=5e-4)
        self._scaler = _scaler(vlm)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Take one iteration on images (B, 3, S, S) of the classes labels (B,)."""
        with self.tuning.attached():
            text = self._vlm.text_features_with_grad(self._tokens)
            features = self._vlm.image_features_with_grad(images)
        self._optimizer.zero_grad()
        loss = cross_entropy(self._vlm.logit_scale * features @ text.T, labels)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Compute the logits (B, K) of images, with all prompts encoded anew."""
        with self.tuning.attached():
            text = self._vlm.text_features_with_grad(self._tokens)
            return self._vlm.logit_scale * self._vlm.image_features_with_grad(images) @ text.T


def _scaler(vlm: VisionLanguageModel) -> torch.amp.GradScaler:
    """Make what keeps small gradients from being rounded to zero in float16, and leaves other precisions alone."""
    return torch.amp.GradScaler(vlm.device.type, init_scale=FIRST_LOSS_SCALE, enabled=vlm.precision == "float16")


def marginal_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of the mean prediction of views, in nats. logits: (n, K). Returns ()."""
    log_mean = logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))  # (K,)
    return -(log_mean.exp() * log_mean).sum()
