"""The hub: checkpoints read from a model repository, and conversions published to one.

`source` opens `hf://owner/name` as a Checkpoint whose shards are fetched as they are needed
(`shelf`, `download`, `remote`); `publish` sends a finished folder, `target` a conversion while it
is made, and `card` writes the model card from the manifest and the evaluation. huggingface_hub is
the client; it is imported only when a hub is really asked, because that takes half a second.
"""
