"""Take the optimiser's steps of a training: forward pass, loss, gradients and update, for one batch after the other.

On a CPU a step of the adapter is a handful of calls of compiled operators, without autograd. On a GPU, steps on
features are replayed from a CUDA graph, and nothing in them waits for the device: the learning rate is a number on it.

Several processes share the images of a batch, and take the step of the whole batch together; see sharing.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from rada_fast.config.method import MaskPenalty
from rada_fast.engine.direct_steps import direct_step, summed_up
from rada_fast.engine.graphs import Recording, usable
from rada_fast.engine.optimizers import set_rate
from rada_fast.engine.room import take_with_room
from rada_fast.engine.sharing import Division, GradientSum, SharedEncoders
from rada_fast.modules.heads import Head
from rada_fast.modules.rational_adapter import RationalAdapter
from rada_fast.ops import AdapterOutput, PreparedAdapter, prediction_loss_and_gradient
from rada_fast.ops.prepared_adapter import Pullback, pullback_of
from rada_fast.system.ranks import Ranks


@dataclass(frozen=True)
class Objective:
    """The loss of a step: the cross-entropy plus the weighted mask penalty (Eq. 14; Eq. 15 if the weight is 0)."""

    penalty: MaskPenalty
    penalty_weight: float


class Parts(NamedTuple):
    """The parts of a loss, each () and detached, and the gradient of the features (B, D), or None."""

    entropy: Tensor
    penalty: Tensor
    correct: Tensor
    dfeatures: Tensor | None


class Gradients:
    """Compute the loss of images and the gradients of a head, and of text features that are trained too.

    head: the rational adapter or the head of another method. An adapter that is more than its named parameters (hooks,
        replaced layers) is called as a module, and so are the other heads.
    text_features: T (K, D); their gradient is computed if they require one.
    logit_scale: the multiplier s.
    objective: the loss.
    of_images: whether the gradient of the images' features is computed too.
    """

    def __init__(
        self,
        head: Head,
        text_features: Tensor,
        logit_scale: Tensor | float,
        objective: Objective,
        *,
        of_images: bool = False,
    ) -> None:
        named: dict[str, Tensor] = dict(head.named_parameters())
        trained = {name: value for name, value in named.items() if value.requires_grad}
        if text_features.requires_grad:
            trained["text_features"] = text_features
        self.trained = list(trained.values())
        self.of_images = of_images
        self.plain = False
        self.fused = False
        self._head, self._text_features, self._logit_scale = head, text_features, logit_scale
        self.penalty_weight, self._penalty = objective.penalty_weight, objective.penalty
        dpenalty = text_features.new_full((), objective.penalty_weight, requires_grad=False)
        self.dpenalty = dpenalty if objective.penalty_weight else None
        self.call: Callable[[Tensor], tuple[AdapterOutput, Pullback]] = self._as_module
        if isinstance(head, RationalAdapter) and head.is_plain():
            self.plain = True
            self.call = prepared = PreparedAdapter(
                text_features, logit_scale, named, head.config, penalty=objective.penalty,
                wanted=[*trained, "image_features"] if of_images else list(trained),
            )  # fmt: skip
            self.fused = prepared.backend in ("cpu", "triton")

    def _as_module(self, features: Tensor) -> tuple[AdapterOutput, Pullback]:
        leaf = features.detach().requires_grad_(self.of_images)
        with torch.enable_grad():
            logits, penalty = self._head(leaf, self._text_features, self._logit_scale, self._penalty)
        leaves = [*self.trained, leaf] if self.of_images else self.trained
        # A head without a mask has a constant penalty.
        pullback = pullback_of(logits, penalty if penalty.requires_grad else None, leaves)
        return AdapterOutput(logits.detach(), penalty.detach(), None), pullback

    def add(self, features: Tensor, labels: Tensor, share: float | Tensor = 1.0, *, first: bool = True) -> Parts:
        """Compute the loss of images and put its gradients into ``.grad`` of what is trained.

        features: (B, D), unit norm; labels: (B,).
        share: the factor of the gradients: the share of these images in the step, times the scale of the loss.
        first: whether the gradients replace those of the step before. Otherwise they are added to those of the step's
            earlier parts.
        """
        output, pullback = self.call(features)
        entropy, dlogits = prediction_loss_and_gradient(output.logits, "cross_entropy", labels=labels)
        dpenalty = self.dpenalty
        if isinstance(share, Tensor) or share != 1.0:
            dlogits = dlogits * share
            dpenalty = None if dpenalty is None else dpenalty * share
        gradients = pullback(dlogits, dpenalty)
        dfeatures = gradients.pop() if self.of_images else None
        if first:
            for parameter, gradient in zip(self.trained, gradients, strict=True):
                parameter.grad = gradient
        else:
            sums = [parameter.grad for parameter in self.trained if parameter.grad is not None]
            torch._foreach_add_(sums, gradients)
        assert output.penalty is not None
        return Parts(entropy, output.penalty, (output.logits.argmax(dim=-1) == labels).sum(), dfeatures)


class ContrastiveGradients:
    """Compute CLIP's contrastive loss of images and one caption each (Radford et al., ICML 2021; FLYP, CVPR 2023).

    With the features f and t of B images and their captions, and logits = s f tᵀ (B, B), the loss is the mean of the
    cross-entropies of the rows and of the columns, where the right answers lie on the diagonal. Another image of the
    same class counts as wrong, as in pre-training.

    captions: the features of the captions, encoded anew in every step.
    logit_scale: the multiplier s, which stays fixed.
    """

    plain = fused = False
    penalty_weight = 0.0

    def __init__(self, captions: TrainedText, logit_scale: float) -> None:
        self._captions, self._logit_scale = captions, logit_scale
        self.trained = [captions.features]

    def add(self, features: Tensor, labels: Tensor, share: float | Tensor = 1.0, *, own: slice = slice(None)) -> Parts:
        """Compute the loss of all images of a step, and put its gradients into ``.grad`` of the captions' features.

        features: (B, D), unit norm; labels: (B,), in which an answer is right if its caption has the image's label.
        share: the factor of the gradients.
        own: the images of this process, whose right answers alone are counted.
        """
        texts = self._captions.features
        images = features.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logit_scale * images @ texts.T
            order = torch.arange(len(labels), device=labels.device)
            loss = (cross_entropy(logits, order) + cross_entropy(logits.T, order)) / 2
        dimages, texts.grad = torch.autograd.grad(loss * share, [images, texts])
        correct = (labels[logits.argmax(dim=-1)] == labels)[own].sum()
        return Parts(loss.detach(), loss.new_zeros(()), correct, dimages)


class TrainedText:
    """Text features that a text encoder computes anew in every step, because something inside it is trained.

    features: the present text features (K, D), a tensor with ``requires_grad`` whose values each step replaces.
    encode: a function from the labels (B,) of all images of a step, and from the slice of this process's images among
        them, to text features with gradients.
    of_images: whether these are the features of one text for each image of this process. Otherwise they are those of
        all classes.
    """

    def __init__(self, features: Tensor, encode: Callable[[Tensor, slice], Tensor], *, of_images: bool = False) -> None:
        self.features, self.of_images, self._encode = features, of_images, encode

    def refresh(self, labels: Tensor, division: Division) -> Tensor:
        """Encode, put the values into `features`, and return the text features with their gradients.

        labels: those of all images of the step; division: how the processes share them. Of the texts of the images,
        each process encodes those of its own, and `features` gets those of all.
        """
        with torch.enable_grad():
            text = self._encode(labels, division.own)
        values = division.gathered(text.detach()) if self.of_images else text.detach()
        if values.shape == self.features.shape:
            with torch.no_grad():
                self.features.copy_(values)
        else:
            self.features.data = values
        self.features.grad = None
        return text


class TrainingStep:
    """Take steps of an optimiser, each on a batch, and sum up what they report.

    gradients: computes the loss and the gradients of the head.
    optimizer: the optimiser of everything that is trained; see training_optimizer.
    micro_batch: the number of images that are computed at once, or None for all. The gradients of the parts are added
        up. Losses and penalties are means over images, so each part counts by its share of the images, and the sum is
        the gradient of the whole batch.
    encode: a function from images (B, 3, S, S) and their names to features (B, D) with gradients, if the image encoder
        is trained. Otherwise the inputs are features.
    scaler: the scaler of the loss for float16.
    text: the text features of the gradients, if they are encoded anew in every step.
    adjust: a function that changes the gradients before the update. It takes the factor by which they are scaled.
    group: the processes that share the images of a batch; by default this one takes them all.
    encoders: the encoders that sum the gradients of their weights themselves, if several processes train some.
    """

    def __init__(
        self,
        gradients: Gradients | ContrastiveGradients,
        optimizer: Optimizer,
        *,
        micro_batch: int | None = None,
        encode: Callable[[Tensor, Sequence[str]], Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        text: TrainedText | None = None,
        adjust: Callable[[Tensor | float], object] | None = None,
        group: Ranks | None = None,
        encoders: SharedEncoders | None = None,
    ) -> None:
        self.gradients, self.optimizer = gradients, optimizer
        self.group, self.encoders = Ranks() if group is None else group, encoders
        self.micro_batch, self.encode = micro_batch, encode
        self.text, self.adjust = text, adjust
        self.scaler = torch.amp.GradScaler(enabled=False) if scaler is None else scaler
        self.device = gradients.trained[0].device
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._entropy, self._penalty, self._correct = self.sums.unbind()
        self._images = 0
        self._recorded: _RecordedStep | None = None
        self._shape: torch.Size | None = None
        summed_by_encoders = {id(parameter) for parameter in encoders.parameters} if encoders is not None else set()
        self._sum = GradientSum(
            self.group, [value for value in self._parameters if id(value) not in summed_by_encoders]
        )
        plain = encode is text is adjust is None and gradients.plain and not self.scaler.is_enabled()
        plain = plain and not self.group.several
        self._records = plain and usable(self.device)
        self._direct = None
        if plain and not self._records and isinstance(gradients, Gradients):
            self._direct = direct_step(gradients.call, optimizer, gradients.trained, gradients.dpenalty)

    @property
    def is_direct(self) -> bool:
        """Whether steps on whole batches call the compiled operators for a CPU directly."""
        return self._direct is not None

    def __call__(
        self, inputs: Tensor, labels: Tensor, rate: float, ids: Sequence[str] = (), counts: Sequence[int] = ()
    ) -> None:
        """Take one step.

        inputs: features (B, D), or images (B, 3, S, S) if the image encoder is trained.
        labels: (B,); rate: the learning rate; ids: the names of the images.
        counts: how many images of the batch each process of the group has, if there are several. B is the number of
            this process's own, which may be 0.

        Where a CUDA graph can be used, the first step of a shape is taken without it, and the second step records it.
        """
        set_rate(self.optimizer, rate)
        count = labels.shape[0]
        self._images += count
        if self._direct is not None and (self.micro_batch is None or count <= self.micro_batch):
            self._direct(inputs, labels, self.sums)
            return
        # Neither PyTorch's fused optimisers nor a replayed graph note the change, by which copies are out of date.
        torch.autograd.graph.increment_version(self._parameters)
        labels = labels.to(self.device, non_blocking=True)
        if self.encode is not None:
            # The images stay where they are; the encoder copies those of a part to its device.
            take_with_room(self, inputs, labels, ids, counts)
            return
        inputs = inputs.to(self.device, non_blocking=True)
        if self._records and self._shape == inputs.shape:
            if self._recorded is None:
                self._record(inputs, labels)
            else:
                self._recorded(inputs, labels)
            return
        if self._recorded is None:
            self._shape = inputs.shape
        take_with_room(self, inputs, labels, ids, counts)

    def _record(self, inputs: Tensor, labels: Tensor) -> None:
        """Take one step, and record it. Where that is not possible, later steps are taken without a recording."""
        step = _RecordedStep(self.take, inputs, labels)
        try:
            step.record()
            self._recorded = step
        except Exception as error:
            self._records = False
            if not step.taken:  # it fails in the same way without a recording, or has room then
                take_with_room(self, inputs, labels)
                return
            warnings.warn(
                "a step of the training could not be recorded in a CUDA graph, and steps are taken without one, more "
                f"slowly: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=3,
            )

    def take(self, inputs: Tensor, labels: Tensor, ids: Sequence[str] = (), counts: Sequence[int] = ()) -> None:
        """Take one step in parts of micro_batch images; see __call__."""
        division = Division(self.group, counts or (len(labels),))
        part = min(self.micro_batch or division.most, division.most)
        scale = self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else 1.0
        if self.encode is not None or self.text is not None or self.group.several:
            self.optimizer.zero_grad()
        text = None
        if self.text is not None:
            text = self.text.refresh(division.gathered(labels) if self.text.of_images else labels, division)
        # Every process has the same number of parts, because encoders may speak to each other in each of them.
        slices = [slice(start, start + part) for start in range(0, division.most, part)]
        if isinstance(self.gradients, ContrastiveGradients):
            self._contrast(self.gradients, inputs, labels, ids, slices, division, scale)
        else:
            for number, part_of in enumerate(slices):
                some, target = inputs[part_of], labels[part_of]
                if not len(target) and self.encoders is None:
                    break
                with self._part(part_of, division):
                    features = some if self.encode is None else self.encode(some, ids[part_of])
                    dfeatures: Tensor | None = torch.zeros_like(features)
                    if len(target):
                        share = len(target) / division.whole * scale
                        parts = self.gradients.add(features.detach(), target, share, first=number == 0)
                        self._note(parts, len(target))
                        dfeatures = parts.dfeatures
                    if dfeatures is not None and features.requires_grad:
                        features.backward(dfeatures)
        if text is not None:
            assert self.text is not None
            if (gradient := self.text.features.grad) is not None:
                text.backward(gradient[division.own] if self.text.of_images else gradient)
        self._sum()
        if self.adjust is not None:
            self.adjust(scale)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _part(self, part_of: slice, division: Division) -> AbstractContextManager[object]:
        """Return the context in which a part of the step is encoded and goes back through the encoders."""
        return nullcontext() if self.encoders is None else self.encoders.last_part(part_of.stop >= division.most)

    def _contrast(
        self,
        gradients: ContrastiveGradients,
        inputs: Tensor,
        labels: Tensor,
        ids: Sequence[str],
        slices: Sequence[slice],
        division: Division,
        scale: Tensor | float,
    ) -> None:
        """Add the gradients of a loss that compares all images of the step.

        The loss needs the features of all parts at once, and those of the other processes too. Each process computes
        the whole loss, and takes the gradients of its own images. A batch of several parts is encoded twice: first
        without gradients, for the loss and the gradients of the features, and then part by part with gradients.
        """
        assert self.encode is not None
        if self.encoders is None:
            slices = [part for part in slices if part.start < len(labels)]
        once = len(slices) == 1
        with torch.set_grad_enabled(once):
            encoded = [self.encode(inputs[part], ids[part]) for part in slices]
        own = division.own
        width = gradients.trained[0].shape[1]
        features = torch.cat([part.detach() for part in encoded]) if encoded else inputs.new_zeros(0, width)
        parts = gradients.add(division.gathered(features.to(self.device)), division.gathered(labels), scale, own=own)
        assert parts.dfeatures is not None
        dfeatures = parts.dfeatures[own]
        for part, before in zip(slices, encoded, strict=True):
            with self._part(part, division):
                again = before if once else self.encode(inputs[part], ids[part])
                again.backward(dfeatures[part])
        self._note(parts, len(labels))

    def _note(self, parts: Parts, images: int) -> None:
        # The sums stay on the device, where they are read once in an epoch.
        self._entropy.add_(parts.entropy, alpha=images)
        self._penalty.add_(parts.penalty, alpha=images)
        self._correct.add_(parts.correct)

    def totals(self) -> dict[str, Any]:
        """Return what the next read_totals depends on so far, as tensors and plain values. This waits for the device.

        The sums are not rounded otherwise if load_totals brings them back: what still waits to be summed up stays so.
        They are those of all processes that share the batches.
        """
        waiting = None if self._direct is None else self._direct.waiting()
        sums = self.sums.clone()
        self.group.all_reduce([sums])
        return {"sums": sums.cpu(), "images": sum(self.group.all_gather(self._images)), "waiting": waiting}

    def load_totals(self, totals: Mapping[str, Any]) -> None:
        """Go on from what totals() has returned. The first of several processes takes the sums of all."""
        if not self.group.first:
            return
        self.sums.copy_(totals["sums"])
        self._images = totals["images"]
        if totals["waiting"] is None:
            return
        if self._direct is not None:
            self._direct.wait_for(totals["waiting"])
        else:
            self.sums += summed_up(totals["waiting"]).to(self.device)

    def read_totals(self) -> Totals:
        """Return the means over the images of all processes since the last call. This waits for the device."""
        if self._direct is not None:
            self._direct.add_to(self.sums)
        images = sum(self.group.all_gather(self._images))
        self.group.all_reduce([self.sums])
        entropy, penalty, correct = (self.sums / max(images, 1)).tolist()
        self.sums.zero_()
        self._images = 0
        return Totals(images, entropy, penalty, correct)


class Totals(NamedTuple):
    """The number of images of some steps, and means over them: cross-entropy, penalty and share of right answers."""

    images: int
    cross_entropy: float
    penalty: float
    accuracy: float


class _RecordedStep:
    """A step that is replayed from a CUDA graph, on copies of its batch.

    take: takes a step on the tensors that it is given.
    inputs, labels: the first batch.
    taken: whether the first step has been taken.
    """

    def __init__(self, take: Callable[[Tensor, Tensor], None], inputs: Tensor, labels: Tensor) -> None:
        self._inputs, self._labels, self._take = inputs.clone(), labels.clone(), take
        self.taken = False

    def record(self) -> None:
        """Take a step on the first batch, then record the launches of the next one."""
        self._recording = Recording(self._step, self._inputs.device)

    def _step(self) -> Tensor:
        self._take(self._inputs, self._labels)
        self.taken = True
        return self._labels

    def __call__(self, inputs: Tensor, labels: Tensor) -> None:
        """Queue a step on a batch of the same shape."""
        with self._recording.in_order():
            self._inputs.copy_(inputs)
            self._labels.copy_(labels)
            self._recording.replay()
