"""This package defines the frozen configurations of the method and of every command, and reads and checks them."""
