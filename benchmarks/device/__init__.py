"""First contact with a GPU: what tells most in ten minutes, see README.md beside this file."""
