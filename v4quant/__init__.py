"""v4quant: from released DeepSeek-V4 weights to a checkpoint you can serve, with proof of its cost."""

__version__ = "0.1.0"
