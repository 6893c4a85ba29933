"""Services of the operating system: files, memory, signals and the terminal; and the warnings that a command gives."""
