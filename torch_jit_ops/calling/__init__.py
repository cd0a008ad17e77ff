"""From a call of an op to its kernel, or to its function where there is none; also while sources are edited and debugged."""
