"""Nets outside of Python: ONNX and ``torch.export`` files, int8, and running them with ONNX Runtime."""
