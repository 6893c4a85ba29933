"""The embedded CLIP: its tokenizer, its architecture, and the weights that are shipped with the package."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, set_model_preprocess_cfg
from safetensors.torch import load_file
from torch import Tensor

from rada_fast.embedded.world import IMAGE_SIZE, WORDS

EMBED_DIM = 512
# The longest caption has 12 words, which start and end make 14 tokens, so prompts with a few more words still fit.
CONTEXT_LENGTH = 20
# Half the pixel range, not the world's own statistics: the test domain is shifted anyway.
MEAN: tuple[float, float, float] = (0.5, 0.5, 0.5)
STD: tuple[float, float, float] = (0.25, 0.25, 0.25)
WEIGHTS: Traversable = files("rada_fast.embedded") / "weights.safetensors"

_WORD = re.compile(r"[a-z0-9]+")


class WordTokenizer:
    """Maps the words of the drawn world to token ids. It is called as open_clip's tokenizers are.

    Ids: 0 padding, 1 any unknown word, 2 start, then WORDS, and the end token last, because open_clip pools the text
    feature at the highest id of a row.
    """

    def __init__(self, words: Iterable[str] = WORDS, context_length: int = CONTEXT_LENGTH) -> None:
        self.pad_id, self.unk_id, self.sot_token_id = 0, 1, 2
        self._ids = {word: 3 + i for i, word in enumerate(words)}
        self.eot_token_id = 3 + len(self._ids)
        self.vocab_size = self.eot_token_id + 1
        self.context_length = context_length

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words alone; case and punctuation are dropped."""
        return [self._ids.get(word, self.unk_id) for word in _WORD.findall(text.lower())]

    def __call__(self, texts: str | Iterable[str], context_length: int | None = None) -> Tensor:
        """Return (N, context_length) int64: start, words, end, padding; long texts lose their last words.

        Raises ValueError where context_length leaves no room for a word.
        """
        length = self.context_length if context_length is None else context_length
        if length < 3:
            raise ValueError(f"context_length must be at least 3, got {length}")
        rows = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        for row, text in zip(tokens, rows, strict=True):
            ids = [self.sot_token_id, *self.encode(text)[: length - 2], self.eot_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def build_model() -> CLIP:
    """Return the untrained embedded CLIP: a ViT with 8 x 8 patches on 48 x 48 pictures and a two-layer text encoder."""
    model = CLIP(
        embed_dim=EMBED_DIM,
        init_logit_scale=math.log(100),
        vision_cfg=CLIPVisionCfg(image_size=IMAGE_SIZE, patch_size=8, width=160, layers=4, head_width=40),
        text_cfg=CLIPTextCfg(
            context_length=CONTEXT_LENGTH, vocab_size=WordTokenizer().vocab_size, width=128, heads=4, layers=2
        ),
    )
    # With this, the transforms that open_clip makes for the model normalise as pre-training did.
    set_model_preprocess_cfg(model, {"size": IMAGE_SIZE, "mode": "RGB", "mean": MEAN, "std": STD})
    return model


def load() -> tuple[CLIP, WordTokenizer]:
    """Return the pre-trained embedded CLIP (float32, evaluation mode, on the CPU) and its tokenizer."""
    model = build_model()
    with as_file(WEIGHTS) as path:
        state = load_file(path)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval(), WordTokenizer()
