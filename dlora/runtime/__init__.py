"""The processes of a run: ranks and rendezvous, failure, exit status, lock, signals, memory."""
