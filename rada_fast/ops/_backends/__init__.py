"""What executes an op: the choice of a backend, one file for each backend of the adapter, and their operators."""
