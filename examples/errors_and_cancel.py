"""Typed errors, deadlines, and stopping an answer early. Needs a running cluster: `splitserve up`."""

from __future__ import annotations

from splitserve.client import Client, DeadlineExceeded, InvalidRequest, RetryPolicy, SplitserveError


def main() -> None:
    with Client(retry=RetryPolicy(max_attempts=5)) as client:
        try:
            client.generate("Hello", temperature=float("nan"))
        except InvalidRequest as error:  # refused before anything is sent
            print(f"{error.code} in {error.field}: {error}")

        try:
            client.generate("Hello", timeout_s=-1.0)
        except DeadlineExceeded as error:
            print(f"{error.code}: {error}")

        try:
            with client.stream("Count: 1, 2, 3,", max_tokens=64, ignore_eos=True) as stream:
                for number, chunk in enumerate(stream, start=1):
                    print(chunk.text, end="", flush=True)
                    if number == 5:
                        break  # leaving the block cancels the request on the router and on both workers
            print("\nstopped early")
        except SplitserveError as error:  # what the retries could not help
            print(f"{error.code} (retryable: {error.retryable}): {error}")


if __name__ == "__main__":
    main()
