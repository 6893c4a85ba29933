"""A run on disk: its folder, the lock on the folder, and the progress that the run shows."""
