"""A run on disk: its folder, the lock on it, what identifies it, and its progress."""
