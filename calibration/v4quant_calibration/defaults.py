"""Names and defaults of options, quick to import: a command line says them before torch loads."""

SOLVER_NAMES = ("rtn", "optimal", "gptq")
"""How codes are found: by the largest magnitude, with the best scales, or solved beforehand."""

MIN_TOKENS = 32
"""Tokens every expert shall see; those with fewer count as starved."""

MOST_FLOORS = 2
"""Noise floors that an evaluation can run."""
