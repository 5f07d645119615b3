"""`python -m dlora.data`: the program, which is above the room."""

from dlora.runtime.exit_status import exit_with
from dlora.training.show_data import main

exit_with(main)
