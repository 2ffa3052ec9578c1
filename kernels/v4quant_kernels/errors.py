"""The root of every error a file or a user can cause.

It stands in the lowest package because all four raise it; the command line turns any
`V4QuantError` into one line (`Error: ...`) and exit code 1.
"""


class V4QuantError(Exception):
    """Something a user or a file did wrong; the message names the thing and the remedy.

    exit_code: what the command line ends with.
    """

    exit_code = 1


class OptionError(V4QuantError):
    """Options that contradict each other, or that lack one they need."""

    exit_code = 2


class UnsupportedScheme(V4QuantError):
    """A scheme that does not exist, or that cannot hold the given shape."""


class NonFiniteWeight(V4QuantError):
    """A weight or scale holds NaN or infinity, which no conversion can carry faithfully."""


class WeightOutOfRange(V4QuantError):
    """A weight is too large for the number format chosen, whose scales are half precision."""
