"""Hostile files, and a process that runs a command on each and watches what it does."""
