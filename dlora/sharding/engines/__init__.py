"""Where W0 is stored: one file for each engine, with the members of `protocol.Engine`."""
