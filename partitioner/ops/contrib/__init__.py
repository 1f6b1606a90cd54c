"""Operators of com.microsoft, as onnxruntime writes them when it optimises or quantises a model."""
