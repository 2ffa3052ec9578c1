"""Synthetic checkpoints of every release: configs (what config.json says), inventory (which tensors
a release holds), values (what they are filled with), writing (shards, index, sparse header-only
files).

The inventory is written from the published layouts and shares no table with v4quant_formats, so
that the two check each other.
"""
