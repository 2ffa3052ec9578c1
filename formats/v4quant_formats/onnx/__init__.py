"""ONNX graphs of single layers, and whether onnxruntime loads them."""
