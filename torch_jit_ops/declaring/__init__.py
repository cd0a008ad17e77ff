"""What an author says of an op: its signature, kernels, dtypes, rows, samples, and the checks of all that."""
