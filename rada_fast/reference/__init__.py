"""Plain PyTorch oracles, one file per op: any device, any float dtype, gradients left to autograd."""
