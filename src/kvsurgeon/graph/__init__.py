"""DimNames for looking at and changing any ONNX graph."""
