"""Routing policies: each a pure function of a snapshot, in a file of its own."""
