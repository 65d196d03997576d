"""Joining a Ray that is not there fails at once, with the address in the message."""

import socket

import pytest
from splitserve.core.errors import ConfigError
from splitserve.deploy.ray_start import joined_ray


def test_a_ray_that_nobody_runs_is_no_wait() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and never listens
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=f"no Ray answers at {address}: Connection refused"),
            joined_ray(address, "n"),
        ):
            pass


def test_what_is_no_address_is_not_tried() -> None:
    with pytest.raises(ConfigError, match="Ray's address is 'head'; it must be HOST:PORT"), joined_ray("head", "n"):
        pass
