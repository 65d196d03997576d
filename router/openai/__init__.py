"""The OpenAI-compatible HTTP API: a thin edge over the same `FrontDoor.answer` that gRPC calls."""
