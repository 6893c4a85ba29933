"""Test-time episodes: adapt to one image's views, predict, forget."""
