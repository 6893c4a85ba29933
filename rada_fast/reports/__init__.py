"""What a run says at its end: summaries, tables and pictures."""
