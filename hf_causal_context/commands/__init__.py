"""The commands of the command line: each a file with its settings and a function `run`.

What takes long to import is imported inside functions, so that mistakes in options are told first.
"""
