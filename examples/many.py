"""Many requests at once with asyncio: the workers batch them. Needs a running cluster: `splitserve up`."""

from __future__ import annotations

import asyncio

from splitserve.client import AsyncClient

PROMPTS = ["One, two, three,", "Roses are red,", "To be or not to be,", "The largest planet is"]


async def main() -> None:
    async with AsyncClient() as client, asyncio.TaskGroup() as tasks:
        # The same seed gives the same answer, whatever else is in the batch.
        answers = [
            tasks.create_task(client.generate(prompt, max_tokens=12, temperature=0.7, seed=1)) for prompt in PROMPTS
        ]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        result = answer.result()
        print(f"{prompt}|{result.text!r} (decoded on {result.timing.decode_worker or '?'})")


if __name__ == "__main__":
    asyncio.run(main())
