"""From a machine to the files it can serve: what fits, where the bytes lie, how to make it.

`machines` knows cards and memory, `footprint` how large a conversion is and where its bytes belong,
`llama_cpp` and `vllm` how each engine shares them out, `loss` and `effort` what is known about
quality and cost, `commands` what to type. `choose` puts them together. Everything here works on
headers and tables alone: no tensor data is read and nothing is written.
"""
