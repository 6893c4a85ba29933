"""Vision-language models through open_clip, and their class features."""
