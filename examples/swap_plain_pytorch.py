"""Put rada_fast in the place of RAda that was written in plain PyTorch, in three lines that keep the trained weights.

Run it with `python examples/swap_plain_pytorch.py`.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class PlainRAda(nn.Module):
    """The rational adapter as the paper's equations say it, with names of one's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_image = nn.Linear(width, width, bias=False)
        self.query_text = nn.Linear(width, width, bias=False)
        self.query_rational = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
        image, text = image_features[:, None], text_features[None]  # (B, 1, D), (1, K, D)
        rational = image * text  # (B, K, D), Eq. 2
        key, value = self.key(rational), self.value(rational)
        queries = self.query_image(image), self.query_text(text), self.query_rational(rational)
        attended = torch.zeros_like(value)
        for query in queries:
            scores = query @ key.mT / key.shape[-1] ** 0.5  # (B, K, K), and (B, 1, K) of the image
            attended = attended + scores.softmax(dim=-1) @ value / 3  # Eq. 6
        mask = 1 + self.output(attended)
        logits: Tensor = logit_scale * (mask * rational).sum(dim=-1)  # Eq. 4
        return logits


torch.manual_seed(0)
images, text = normalize(torch.randn(6, 64), dim=-1), normalize(torch.randn(20, 64), dim=-1)
plain = PlainRAda(64)
before = plain(images, text, 100.0).detach()

# Where your arithmetic differs (heads, softmax, scales, biases), name the difference in AdapterConfig.
NAMES = {
    "query_image": "q_proj1",
    "query_text": "q_proj2",
    "query_rational": "q_proj3",
    "key": "k_proj",
    "value": "v_proj",
    "output": "out_proj",
}
# BEGIN
import rada_fast  # noqa: E402 (the lines stand together, to be copied)

adapter = rada_fast.RationalAdapter(rada_fast.AdapterConfig.paper(embed_dim=64))
adapter.load_state_dict({f"{NAMES[name]}.weight": layer.weight for name, layer in plain.named_children()})
# END

after = adapter(images, text, 100.0).detach()
torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
print(f"the largest difference between logits is {float((after - before).abs().max()):.1e}")
