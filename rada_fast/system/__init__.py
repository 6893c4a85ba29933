"""What a program needs of the operating system: files, signals, the terminal, and warnings."""
