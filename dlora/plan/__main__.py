"""`python -m dlora.plan`."""

from dlora.exits import exit_with
from dlora.plan import main

exit_with(main)
