"""Random faults against a cluster of real processes: `python -m splitserve.benchmarks.chaos`."""
