"""The verbs of the command line: each takes the parsed arguments, calls the API, prints, and
returns the exit code."""
