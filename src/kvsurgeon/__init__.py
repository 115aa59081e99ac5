"""Put a KV cache into an exported ONNX language model, and prove that it still computes the same."""
