"""The OpenAI-compatible HTTP API: a thin edge over the same `Inference.answer` that gRPC calls."""
