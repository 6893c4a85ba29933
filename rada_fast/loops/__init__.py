"""The three loops, ttt, eft and fft, each of which can be read from top to bottom."""
