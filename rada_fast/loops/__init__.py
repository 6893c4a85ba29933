"""The three loops, each readable top to bottom."""
