"""What is trained inside frozen encoders: words of the prompt, tokens in front of every block, and adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rada_fast.config.methods import TuningName
from rada_fast.config.options import TuningOptions
from rada_fast.models.prompts import Prompts
from rada_fast.models.vision_language import VisionLanguageModel


class Captions(NamedTuple):
    """The tokens of all prompts of K classes, those of a class side by side.

    tokens: (P, L) for P prompts in all; starts: (K,), the first prompt of each class; counts: (K,), their numbers.
    """

    tokens: Tensor
    starts: Tensor
    counts: Tensor

    def drawn(self, labels: Tensor) -> Tensor:
        """Draw one prompt of the class of each label (B,), with PyTorch's random numbers. Returns (B, L)."""
        counts = self.counts[labels]
        return self.tokens[self.starts[labels] + (torch.rand(len(labels)) * counts).long().clamp(max=counts - 1)]


def captions_of(vlm: VisionLanguageModel, names: Sequence[str], prompts: Prompts) -> Captions:
    """Return the captions of classes on the CPU."""
    texts = [prompts.of(name) for name in names]
    counts = torch.tensor([len(own) for own in texts])
    tokens = vlm.tokenizer([text for own in texts for text in own])
    return Captions(tokens, counts.cumsum(0) - counts, counts)


class EncoderTuning(nn.Module):
    """What a method trains inside the two frozen encoders of a model, as its row in config/methods.py says.

    "context": the first n tokens of every class's prompt are learned, the same for all classes (CoOp, Zhou et al., IJCV
    2022, with a context that all classes share and the name at the end).

    "prompts": as "context", and tokens of their own for each of the first J blocks of both encoders (deep prompts in
    independent branches: IVLP of MaPLe, Khattak et al., CVPR 2023, in which the published code combines them with
    RAda). In the text encoder they take the places of the first n tokens. In the image encoder n tokens are appended
    behind those of the picture, replaced before each further block up to J, and dropped behind the last block, so that
    no later layer sees them. They are appended behind the normalisation before the first block.

    "coupled-prompts": as "prompts", but the tokens of the image encoder are no parameters of their own. Those of its
    first block are a learned linear map of the context, and those of each further block, up to J, a learned linear map
    of the tokens of the text encoder's block at the same depth (MaPLe itself). J is at most the number of blocks of
    either encoder.

    "adapters": behind each of the last J blocks of both encoders, x' = x + W2 relu(W1 x) for each token x, with W1 of
    (w, W), W2 of (W, w) and biases (Houlsby et al., ICML 2019; in both encoders, as in MMA, Yang et al., CVPR 2024, but
    without weights that both share). W2 starts at zero, so the features start as they are.

    Nothing is changed until the context `attached` is entered.

    name: the row's name of the tuning.
    vlm: the model.
    template: the only prompt of the classes. If there are n tokens before the name, the learned ones start as these,
        as "a photo of a" does with n = 4. Otherwise they take the place of everything before the name and start at
        random, as all other learned tokens do (standard deviation 0.02).
    options: n, J and w.
    seed: the seed of what starts at random.

    Raises UserError if an encoder is not a transformer, and the tuning needs its blocks.
    """

    def __init__(
        self, name: TuningName, vlm: VisionLanguageModel, template: str, options: TuningOptions, seed: int
    ) -> None:
        super().__init__()
        self.changes_images = name != "context"
        """Whether the features of images change too; if not, they can be computed once."""
        towers = [vlm.image_tower(), vlm.text_tower()] if self.changes_images else []
        # The model and its blocks are no parts of this module: their weights are neither trained nor stored with it.
        self._vlm, self._blocks = [vlm], [tower.blocks for tower in towers]
        self.template = template
        """The prompt that was given."""
        self._template, self._first = template, 0
        self.context: nn.Parameter | None = None
        self.image_prompts, self.text_prompts = nn.ParameterList(), nn.ParameterList()
        self.prompt_projections = nn.ModuleList()
        self.image_adapters, self.text_adapters = nn.ModuleList(), nn.ModuleList()
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed every CUDA device too, and nothing would restore their states.
            torch.default_generator.manual_seed(seed)
            if name != "adapters":
                self._start_context(options.context_tokens)
            if name == "prompts":
                image, text = towers
                depth = options.prompt_depth
                self.image_prompts.extend(_tokens(options.context_tokens, image.width) for _ in image.blocks[:depth])
                self.text_prompts.extend(_tokens(options.context_tokens, text.width) for _ in text.blocks[1:depth])
            if name == "coupled-prompts":
                image, text = towers
                depth = min(options.prompt_depth, len(image.blocks), len(text.blocks))
                self.text_prompts.extend(_tokens(options.context_tokens, text.width) for _ in range(depth - 1))
                self.prompt_projections.extend(nn.Linear(text.width, image.width) for _ in range(depth))
            if name == "adapters":
                for tower, adapters in zip(towers, (self.image_adapters, self.text_adapters), strict=True):
                    blocks = tower.blocks[-options.adapter_depth :]
                    adapters.extend(_bottleneck(tower.width, options.adapter_width) for _ in blocks)
        self.to(vlm.device)

    def _start_context(self, count: int) -> None:
        (vlm,) = self._vlm
        words = self._template.partition("{}")[0].strip()
        self._first = _same_tokens(vlm, "", "a")
        embedding = _token_embedding(vlm.model)
        if _same_tokens(vlm, words, f"{words} a".strip()) >= self._first + count:
            tokens = vlm.tokens([words])[0, self._first : self._first + count]
            self.context = nn.Parameter(embedding.weight[tokens].detach().float().clone())
        else:
            self._template = " ".join(["X"] * count) + " {}" + self._template.partition("{}")[2]
            self.context = _tokens(count, embedding.embedding_dim)

    def tokens_of(self, names: Sequence[str]) -> Tensor:
        """Return the tokens (K, L) of the prompts of classes, in which learned tokens may take the places of some."""
        (vlm,) = self._vlm
        return vlm.tokens([self._template.replace("{}", name) for name in names])

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the encoders compute with what is trained while the context lasts, with gradients where they are on."""
        (vlm,) = self._vlm
        hooks: list[RemovableHandle] = []
        try:
            if self.context is not None:
                hooks.append(_token_embedding(vlm.model).register_forward_hook(self._put_context))
            if self._blocks:
                image, text = self._blocks
                depth = len(self.image_prompts) + len(self.prompt_projections)
                for number, block in enumerate(image[:depth]):
                    prompts_of = partial(self._prompts_of_image, number)
                    hooks.append(block.register_forward_pre_hook(_appending(prompts_of, replaces=number > 0)))
                for block, prompts in zip(text[1:], self.text_prompts, strict=False):
                    hooks.append(block.register_forward_pre_hook(self._replacing(prompts)))
                if depth and self.context is not None:
                    hooks.append(image[-1].register_forward_hook(_dropping(len(self.context))))
                for blocks, adapters in ((image, self.image_adapters), (text, self.text_adapters)):
                    for block, adapter in zip(blocks[len(blocks) - len(adapters) :], adapters, strict=True):
                        hooks.append(block.register_forward_hook(_adding(adapter)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _prompts_of_image(self, number: int) -> Tensor:
        """Return the tokens (n, W) that a block of the image encoder sees behind those of the picture."""
        if not len(self.prompt_projections):
            return self.image_prompts[number]
        source = self.context if number == 0 else self.text_prompts[number - 1]
        prompts: Tensor = self.prompt_projections[number](source)
        return prompts

    def _with_tokens(self, tokens: Tensor, learned: Tensor) -> Tensor:
        """Put learned tokens (n, W) into the places of the first tokens (N, L, W) behind the start."""
        rows = learned.to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat([tokens[:, : self._first], rows, tokens[:, self._first + len(learned) :]], dim=1)

    def _put_context(self, module: nn.Module, given: tuple[Any, ...], tokens: Tensor) -> Tensor:
        assert self.context is not None
        return self._with_tokens(tokens, self.context)

    def _replacing(self, prompts: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda module, given: (self._with_tokens(given[0], prompts), *given[1:])


def _tokens(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(count, width))


def _bottleneck(width: int, hidden: int) -> nn.Sequential:
    """Return W2 relu(W1 x) with biases, and W2 and its bias zero."""
    down, up = nn.Linear(width, hidden), nn.Linear(hidden, width)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)
    return nn.Sequential(down, nn.ReLU(), up)


def _appending(
    prompts_of: Callable[[], Tensor], *, replaces: bool
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Return a hook that appends tokens (n, W) to those of a block's input, or replaces the last n of them.

    prompts_of: a function that returns the tokens; it is called in every forward pass, after whose step they differ.
    """

    def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens: Tensor = given[0]
        prompts = prompts_of()
        kept = tokens[:, : -len(prompts)] if replaces else tokens
        return torch.cat([kept, prompts.to(tokens.dtype).expand(len(tokens), -1, -1)], dim=1), *given[1:]

    return hook


def _dropping(count: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    """Return a hook that drops the last tokens of a block's output."""
    return lambda module, given, output: _changed(output, lambda tokens: tokens[:, :-count])


def _adding(adapter: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    """Return a hook that adds what an adapter makes of the tokens of a block's output."""
    return lambda module, given, output: _changed(output, lambda tokens: tokens + adapter(tokens).to(tokens.dtype))


def _changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the tokens of a block's output, which is these tokens or a tuple that begins with them."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _token_embedding(model: nn.Module) -> nn.Embedding:
    """Return the embedding of the tokens of texts, which is the largest one outside of the image encoder."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not name.startswith("visual.")
    ]
    return max(found, key=lambda module: module.num_embeddings)


def _same_tokens(vlm: VisionLanguageModel, text: str, longer: str) -> int:
    """Return how many tokens at the start are the same in two texts."""
    first, second = vlm.tokens([text, longer])
    return int((first == second).int().cumprod(0).sum())
