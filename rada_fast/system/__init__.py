"""Services of the operating system: files, signals and the terminal; and the warnings that a command gives."""
