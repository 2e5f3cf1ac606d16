"""``python -m fastloss``."""

from fastloss.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
