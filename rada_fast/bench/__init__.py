"""What the code costs: what kernels compile to, and which tiles are fastest."""
