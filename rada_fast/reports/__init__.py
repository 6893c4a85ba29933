"""This room makes what a run reports at its end: summaries, tables and pictures."""
