"""The library: one public function per verb, which the command line calls as Python users do.

Functions take names as people write them (folders, `hf://owner/name`, `builtin:tiny-v4`, sizes like
"6GB"), keyword-only options with the command line's defaults, and a `Progress`; they return frozen
dataclasses, print nothing and raise `V4QuantError`. `import v4quant` offers all of them.
"""
