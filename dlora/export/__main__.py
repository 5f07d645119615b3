"""`python -m dlora.export --adapter DIR --to DIR [--merge]`."""

from dlora.export.command import main
from dlora.runtime.exit_status import exit_with

if __name__ == "__main__":
    exit_with(main)
