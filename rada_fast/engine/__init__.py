"""Test-time episodes: adapt a copy of the adapter to the views of one image, and predict the image with it."""
