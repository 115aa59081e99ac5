"""Query, edit and execute any ONNX graph, without knowledge of decoders."""
