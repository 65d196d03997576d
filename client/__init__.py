"""The gRPC SDK, sync and async; needs neither torch nor ray."""
