"""Measure the two published traces and write planner/trace_statistics.py: what the traffic generator is built from.

$ SPLITSERVE_DATA=DIRECTORY python scripts/measure_traces.py
"""

from __future__ import annotations

import pprint
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from splitserve.planner.traces import AZURE_TRACE, MOONCAKE_TRACE, data_directory, read_trace
from splitserve.planner.types import SimRequest

TARGET = Path(__file__).parents[1] / "planner" / "trace_statistics.py"
PERCENTS = (0, 1, 2.5, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 97.5, 99, 99.5, 99.9, 100)
PART_S = 300.0


def at(values: Sequence[float], digits: int = 0) -> tuple[float, ...]:
    if not len(values):
        return ()
    return tuple(round(float(value), digits) for value in np.percentile(values, PERCENTS))


def measure(requests: Sequence[SimRequest]) -> dict[str, object]:
    times = np.array([request.arrival_s for request in requests])
    num_parts = int(times[-1] // PART_S)
    counts = np.histogram(times, bins=np.arange(num_parts + 1) * PART_S)[0]
    rate = counts.sum() / (num_parts * PART_S)
    last_with: dict[
        int, int
    ] = {}  # hash id -> latest request that has it; ids of these traces stand for whole prefixes
    shared, ages, new, continued = [], [], [], []
    for index, request in enumerate(requests):
        known = 0
        while known < len(request.hash_ids) and request.hash_ids[known] in last_with:
            known += 1
        if known > 1:
            continued.append(request.isl)
            shared.append(known / len(request.hash_ids))
            ages.append(request.arrival_s - requests[last_with[request.hash_ids[known - 1]]].arrival_s)
        else:
            new.append(request.isl)
        last_with.update(dict.fromkeys(request.hash_ids, index))
    return {
        "rate": round(float(rate), 4),
        "profile": tuple(round(float(count / PART_S / rate), 3) for count in counts),
        "part_s": PART_S,
        "percents": tuple(float(percent) for percent in PERCENTS),
        "isl_new_at": at(new),
        "isl_continued_at": at(continued) or at(new),
        "osl_at": at([request.osl for request in requests]),
        "continued": round(len(continued) / len(requests), 4),
        "shared_at": at(shared, 3),
        "age_s_at": at(ages, 1),
        "block_tokens": requests[0].hash_block_tokens if requests[0].hash_ids else 0,
    }


def main() -> None:
    found = {}
    for name, file in (("mooncake", MOONCAKE_TRACE), ("azure", AZURE_TRACE)):
        path = data_directory() / file
        if not path.exists():
            sys.exit(f"{path} is not there; set SPLITSERVE_DATA to the directory of the published traces")
        found[name] = measure(read_trace(path).requests)
    TARGET.write_text(
        '"""Statistics of two published traces, measured by scripts/measure_traces.py: edit that instead.\n\n'
        "mooncake: conversations, github.com/kvcache-ai/Mooncake, Apache-2.0. azure: conversations of 2023,\n"
        'github.com/Azure/AzurePublicDataset, CC-BY 4.0.\n"""\n\n'
        "from __future__ import annotations\n\nfrom typing import Any\n\n"
        f"# fmt: off\nSTATISTICS: dict[str, dict[str, Any]] = "
        f"{pprint.pformat(found, sort_dicts=False, compact=True, width=118)}\n# fmt: on\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
