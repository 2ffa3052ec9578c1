"""The hub as a source: checkpoints read from a model repository.

`source` opens `hf://owner/name` as a Checkpoint whose shards are fetched as they are needed
(`shard_cache`, `download`, `remote`). huggingface_hub is the client; it is imported only when a hub
is really asked, because that takes half a second.
"""
