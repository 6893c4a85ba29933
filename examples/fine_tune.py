"""Fine-tune on folders of images from Python, evaluate on other images, and keep the adapter.

    python examples/fine_tune.py

The images are drawn here and the model is the small one that is shipped. For your own, give the folder of a picture
folder for each class, and the name of a model of open_clip with its `pretrained` weights.
"""

import tempfile
from pathlib import Path

import rada_fast
from rada_fast.data.open import open_source
from rada_fast.embedded.world import write_imagefolder
from rada_fast.models.image_features import features_of

folder = Path(tempfile.mkdtemp())
write_imagefolder(folder / "train", images_per_class=2, seed=0, shift="mixed")
write_imagefolder(folder / "test", images_per_class=1, seed=1, shift="mixed")

tuned = rada_fast.fine_tune(
    f"imagefolder:{folder / 'train'}",
    model="embedded",  # or model="ViT-B-16-quickgelu", pretrained="openai"
    setting="eft",  # "fft" trains the image encoder too
    epochs=5,
    train_views="center",  # encodes each image once; the default is a random crop of it in every epoch
    on_epoch=lambda record: print({name: record[name] for name in ("epoch", "loss") if name in record}),
)

assert tuned.model is not None  # it would be None after a training on features in memory
test = features_of(open_source(f"imagefolder:{folder / 'test'}"), tuned.model, title="encode", workers=0)
zero_shot = (test.features @ tuned.text_features.T).argmax(dim=-1)
adapted = tuned(test.features).argmax(dim=-1)
for name, answers in {"zero-shot": zero_shot, "fine-tuned": adapted}.items():
    print(f"{name}: {(answers == test.labels).float().mean():.1%} of {len(test.labels)} images are right")

rada_fast.save_adapter(tuned.adapter, folder / "adapter.safetensors")
adapter = rada_fast.load_adapter(folder / "adapter.safetensors")
logits = adapter(test.features, tuned.text_features, tuned.logit_scale)
assert (logits.argmax(dim=-1) == adapted).all()
