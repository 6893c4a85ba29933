"""Other methods, in plain PyTorch, that the command `bench` measures beside this package.

They are written from the equations of their papers. Each takes the features or the views of one picture, the original
first, and returns one value for each class, the largest for its answer. No state is left from one picture to the next.
"""
