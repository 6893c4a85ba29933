"""The package's own small CLIP and the drawn world it was trained on.

`world` draws captioned pictures and a shifted version of them, `model` loads a CLIP of open_clip's own classes from
`weights.safetensors`, and `python -m rada_fast.embedded.pretrain` remakes those weights. Together they show Rational
Adaptation on a machine with no network, in minutes; they say nothing about accuracy on photographs.
"""
