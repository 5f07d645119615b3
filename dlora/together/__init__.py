"""Several adapters trained in one run, on one gather of W0 for all of them."""
