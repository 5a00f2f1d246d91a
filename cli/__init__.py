"""The command line: typed flags, their checks, and the output of each mode."""
