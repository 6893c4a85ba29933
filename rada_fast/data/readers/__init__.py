"""Each file here reads one layout in which data lie on disk; `open.py` beside this folder lists their kinds."""
