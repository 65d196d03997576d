"""One model over several devices: each process (rank) holds a part of every layer and its own KV heads.

Rank 0 is the worker itself, with the only scheduler; it starts the others, tells them each step and ends with them.
"""
