"""Thin programs that start `dlora.train` where others own the processes."""

NAME = __name__  # `launchers` in a checkout, `dlora.launchers` where the wheel is installed
