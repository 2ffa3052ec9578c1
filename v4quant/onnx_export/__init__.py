"""Single layers as ONNX graphs."""
