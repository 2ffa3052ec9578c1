"""The reference forward pass of DeepSeek-V4 and V4.1: plain torch, float32, one file per idea.

Start at `block.layer_forward`; `stream.py` beside this folder runs whole models through it. The
architecture is that of the technical report (arXiv 2606.19348) with the details of the inference
code that the release ships; each module's text states the formulas it follows. Where releases
differ, `LayerFacts` and `ModelConfig` say so, or a file has the new idea: `engram`, `candidates`,
`caches`. Nothing here keeps gradients. The arithmetic runs on the device and in the dtype of the
tensors the parameters give: float32 is the reference, float64 works and is what invariance tests
use.
"""
