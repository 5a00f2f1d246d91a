"""Memory and speed of a run, predicted before a GPU is rented."""
