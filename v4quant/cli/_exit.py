"""Exit codes of the command line besides 0 and Click's own 2 for wrong usage."""

FAILED = 1
DIFFERENT = 3  # a verification found a difference, an evaluation damaged matrices, inspect defects
INTERRUPTED = 130  # SIGINT
TERMINATED = 143  # SIGTERM
