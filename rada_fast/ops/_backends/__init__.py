"""The backends that execute the ops: their choice, a file for each backend of the adapter, and their operators."""
