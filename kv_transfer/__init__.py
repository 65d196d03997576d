"""Moves KV cache from prefill to decode workers, fenced and verified."""
