"""Thin programs that start `dlora.train` where others own the processes."""
