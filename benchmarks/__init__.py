"""One script, one question."""
