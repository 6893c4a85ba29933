"""Data: image files and extracted features, and the views that are made of images."""
