"""Configurations and how they are read: the method's, the commands' options, the checks of both."""
