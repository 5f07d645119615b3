"""`python -m dlora.plan`."""

from dlora.plan import main
from dlora.runtime import exit_with

exit_with(main)
