"""The three ways to use the adapter, each in a file of its own: the commands ttt, eft and fft."""
