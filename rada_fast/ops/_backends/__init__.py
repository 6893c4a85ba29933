"""What executes an op: the choice among backends, and one file for each way to run the adapter."""
