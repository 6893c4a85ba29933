"""Plain PyTorch oracles, one file for each op. They run on any device, with any float type and with autograd."""
