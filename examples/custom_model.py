"""Use a model of your own: wrap it so that it has the four attributes that the package asks for.

    python examples/custom_model.py

Any pair of encoders will do whose features have one width. `rada_fast/models/protocol.py` has the contract.
"""

import torch
from PIL import Image
from torch import Tensor, nn

import rada_fast
from rada_fast.data.views import Preprocess
from rada_fast.models.vision_language import VisionLanguageModel

WORDS = {"": 0, "a": 1, "photo": 2, "of": 3, "red": 4, "blue": 5, "square": 6}


class OwnModel(nn.Module):
    """Two encoders with the attributes of a DualEncoder: visual, logit_scale, encode_image and encode_text."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.words = nn.Embedding(len(WORDS), width)
        self.logit_scale = nn.Parameter(torch.tensor(100.0).log())

    def encode_image(self, image: Tensor, /) -> Tensor:
        features: Tensor = self.visual(image)
        return features

    def encode_text(self, text: Tensor, /) -> Tensor:
        return self.words(text).mean(dim=1)


def tokenizer(texts: list[str], length: int = 8) -> Tensor:
    """Return the ids of the words (N, L), with zeros behind them."""
    rows = [[WORDS.get(word, 0) for word in text.rstrip(".").split()][:length] for text in texts]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


torch.manual_seed(0)
model = VisionLanguageModel(
    "own",
    None,  # the name of the weights, for reports
    OwnModel(),
    tokenizer,
    Preprocess(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    device=torch.device("cpu"),
    precision="float32",
)

# Everything of the package that takes a model takes this one.
predictor = rada_fast.TestTimePredictor(model, ["red square", "blue square"], views=16)
pictures = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]
for result in predictor.predict(pictures):
    print(result.id, result.name, result.probabilities)  # random weights, so that the answers mean nothing
