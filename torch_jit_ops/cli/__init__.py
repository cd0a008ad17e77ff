"""The command line: one module for each command, each with ``add_arguments(parser)`` and ``run(options) -> exit code``."""
