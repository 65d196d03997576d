"""Erlang's formula for waiting in front of several servers."""

from __future__ import annotations


def erlang_c(servers: int, offered: float) -> float:
    """Probability that an arrival waits in M/M/c with `offered` = rate x mean service time below `servers`."""
    blocking = 1.0
    for count in range(1, servers + 1):  # Erlang B by its recursion, stable for any number of servers
        blocking = offered * blocking / (count + offered * blocking)
    return waiting_probability(servers, offered, blocking)


def waiting_probability(servers: int, offered: float, blocking: float) -> float:
    """Erlang C from Erlang B."""
    return blocking / (1 - offered / servers * (1 - blocking))
