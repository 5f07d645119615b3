"""`python -m dlora.plan`."""

from dlora.plan import main
from dlora.runtime.exit_status import exit_with

exit_with(main)
