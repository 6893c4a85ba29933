"""Make a live model of the published code faster, in three lines that keep its parameters and its optimiser.

In a checkout of the published code, put the lines between BEGIN and END into `eft/train.py`, below
`trainer = build_trainer(cfg)`, with `trainer.model` in place of `model`. Here a small model stands in for the published
one, so that this file runs by itself:

    python examples/patch_published_model.py
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from rada_fast.compat import SimpleMultiheadAttention


class CustomCLIP(nn.Module):
    """The published model, with the features of images in place of the images: its names and its forward pass."""

    def __init__(self, text_features: Tensor) -> None:
        super().__init__()
        self.class_features = text_features
        self.logit_scale = nn.Parameter(torch.tensor(4.6), requires_grad=False)
        # In the published code this is a class of the same name, with the same parameters and the same forward.
        self.mha = SimpleMultiheadAttention(text_features.shape[1], num_heads=8, t=1.0)

    def forward(self, image_features: Tensor) -> Tensor:
        scale = self.logit_scale.exp().detach()
        image, text = normalize(image_features, dim=-1)[:, None], self.class_features[None]  # (B, 1, D), (1, K, D)
        rational = image * text  # (B, K, D)
        queries = scale.sqrt() * image.expand_as(rational), scale.sqrt() * text.expand_as(rational)
        offset, _ = self.mha(*queries, scale * rational, scale * rational, scale * rational)
        mask = torch.relu(1 + offset)
        logits: Tensor = scale * (mask * rational).sum(dim=-1)
        return logits


torch.manual_seed(0)
images, labels = torch.randn(6, 64), torch.randint(20, (6,))
model = CustomCLIP(normalize(torch.randn(20, 64), dim=-1))
optimizer = torch.optim.AdamW(model.mha.parameters(), lr=1e-3)


def step() -> float:
    """Take a step of the optimiser and return the loss before it."""
    loss = cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


print(f"loss {step():.4f} with the published arithmetic")  # the optimiser has moments now
before = model(images).detach()

# BEGIN
import rada_fast  # noqa: E402 (the lines stand together, to be copied)

patched = rada_fast.compat.patch(model)
# END

after = model(images).detach()
torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
print(f"{patched} is patched; the largest difference between logits is {float((after - before).abs().max()):.1e}")
print(f"loss {step():.4f} with the same parameters and the same optimiser")

rada_fast.compat.unpatch(model)  # gives the model its own arithmetic back
