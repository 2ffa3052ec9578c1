"""The reference forward pass of DeepSeek-V4: plain torch, float32, one file an idea.

Start at `block.layer_forward`; `stream.py` beside this folder runs whole models through it.
"""
