"""v4quant: released DeepSeek-V4 weights to a checkpoint you can serve, with proof of its cost."""

__version__ = "0.1.0"
