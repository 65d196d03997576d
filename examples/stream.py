"""Stream one answer, then say where its time went. Needs a running cluster: `splitserve up`."""

from __future__ import annotations

from splitserve.client import Client


def main() -> None:
    # No address: SPLITSERVE_ADDRESS, else the local cluster that `splitserve up` started.
    with Client() as client:
        with client.stream("The capital of France is", max_tokens=16) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        result = stream.result()
    timing = result.timing
    print(f"\n{result.usage.num_output_tokens} tokens, finished by {result.finish_reason.value}")
    print(f"TTFT {timing.ttft_s * 1e3:.1f} ms; {timing.kv_bytes:,} bytes of KV moved by {timing.transport}")


if __name__ == "__main__":
    main()
