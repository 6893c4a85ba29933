"""Vision-language models through open_clip, the names of classes, and the features of texts and images."""
