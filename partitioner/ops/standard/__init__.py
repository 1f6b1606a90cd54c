"""The operators of ONNX, one class each: map, kernel and examples."""
