"""Where W0 lives: one file for each engine, all of them with the members of `protocol.Engine`."""
