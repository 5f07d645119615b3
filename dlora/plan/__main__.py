"""`python -m dlora.plan`."""

from dlora.plan.command import main
from dlora.runtime.exit_status import exit_with

exit_with(main)
