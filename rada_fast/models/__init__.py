"""Vision-language models of open_clip, the names of classes, and the features of texts and images."""
