"""``python -m rada_fast``."""

from rada_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
