"""The commands of the command line: each a file with its settings and a function `run`."""
