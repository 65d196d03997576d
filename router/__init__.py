"""The front door: text, dispatch, retry, streaming."""
