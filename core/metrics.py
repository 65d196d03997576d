"""Names of every metric, and the process's Prometheus registry; a name lives here or nowhere."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class LinkMetrics:
    """Who was refused at the links of one process. gRPC does not tell of handshakes that failed: they are those begun
    less those that a call followed. They outlive a registry, which a worker's change of role replaces.
    """

    def __init__(self) -> None:
        self.refused = Counter("splitserve_refused", "Calls refused for who makes them", ["reason"], registry=None)
        self._handshakes = Counter("splitserve_tls_handshakes", "TLS handshakes with peers", ["outcome"], registry=None)
        self.tls_begun = self._handshakes.labels("begun")
        self.tls_accepted = self._handshakes.labels("accepted")

    def publish(self, registry: CollectorRegistry) -> None:
        registry.register(self.refused)
        registry.register(self._handshakes)


class WorkerMetrics:
    """Metrics of one worker process (prefill, decode or colocated)."""

    def __init__(self, registry: CollectorRegistry, role: str, links: LinkMetrics | None = None) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"splitserve_{name}", text, ["role"], registry=registry).labels(role)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"splitserve_{name}", text, ["role"], registry=registry).labels(role)

        def seconds(name: str, text: str) -> Histogram:
            full = f"splitserve_{name}_seconds"
            return Histogram(full, text, ["role"], buckets=_SECONDS, registry=registry).labels(role)

        self.blocks_total = gauge("kv_blocks", "KV blocks of the pool")
        self.blocks_free = gauge("kv_blocks_free", "KV blocks that hold nothing")
        self.blocks_cached = gauge("kv_blocks_cached", "KV blocks held by the prefix cache alone")
        self.blocks_live = gauge("kv_blocks_live", "KV blocks held by live sequences")
        self.blocks_granted = gauge("kv_blocks_granted", "KV blocks reserved for incoming transfers")
        self.blocks_orphaned = gauge("kv_blocks_orphaned", "KV blocks nobody owns; must stay 0")
        self.running = gauge("running_sequences", "Sequences in the running batch")
        self.waiting = gauge("waiting_sequences", "Sequences waiting for the engine")
        self.held = gauge("held_sequences", "Prefilled sequences whose KV waits to be fetched")
        self.steps = counter("steps", "Engine steps finished")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed")
        self.cached_tokens = counter("cached_prompt_tokens", "Prompt tokens served by the prefix cache")
        self.output_tokens = counter("output_tokens", "Tokens sampled")
        self.preemptions = counter("preemptions", "Sequences preempted by recompute")
        self.recomputed_prompt_tokens = counter(
            f"{role}_recomputed_prompt_tokens",
            "Prompt tokens this worker computed although KV should have come; 0",
        )
        self.transfer_bytes = counter("transfer_bytes", "KV bytes moved (sent by prefill, received by decode)")
        self.transfers = counter("transfers", "KV transfers committed")
        self.transfer_failures = counter("transfer_failures", "KV transfers that failed")
        self.transfer_resumes = counter("transfer_resumes", "KV transfers whose missing part was fetched anew")
        self.transfer_resent_bytes = counter("transfer_resent_bytes", "KV bytes sent once more, by prefill")
        self.stale_messages = counter("stale_messages", "Messages dropped because no live grant matches them")
        self.step_seconds = seconds("step", "One engine step")
        self.transfer_seconds = seconds("transfer", "First KV byte ready to commit")
        self.transfer_exposed_seconds = seconds("transfer_exposed", "End of prefill to commit")

        self.links = links or LinkMetrics()
        self.links.publish(registry)

        def device(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"splitserve_gpu_{name}", text, ["gpu", *labels], registry=registry)

        self.gpu_memory_used = device("memory_used_bytes", "Memory of the GPU in use")
        self.gpu_memory_total = device("memory_total_bytes", "Memory of the GPU")
        self.gpu_temperature = device("temperature_celsius", "Temperature of the GPU")
        self.gpu_power = device("power_watts", "Power that the GPU draws")
        self.gpu_sm_clock = device("sm_clock_hertz", "Clock of the GPU's multiprocessors")
        self.gpu_throttled = device("throttled", "1 while the GPU is slowed down for this reason", "reason")
        self.gpu_ecc_errors = device("ecc_errors", "Memory errors since the GPU's last reset", "kind")
        self.gpu_nvlinks_up = device("nvlinks_up", "NVLinks of the GPU that are up")


class RouterMetrics:
    """Metrics of one router process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter("splitserve_requests", "Requests ended", ["outcome"], registry=registry)
        self.live = Gauge("splitserve_live_requests", "Requests not ended yet", registry=registry)
        self.queued = Gauge("splitserve_queued_requests", "Requests waiting for dispatch", registry=registry)
        self.overloaded = Counter(
            "splitserve_overloaded_requests", "Requests refused for lack of room", registry=registry
        )
        self.retries = Counter("splitserve_retries", "Attempts after the first", registry=registry)
        self.retries_left = Gauge(
            "splitserve_retry_budget", "Retries that the budget still allowed after the last one", registry=registry
        )
        self.takeovers = Counter(
            "splitserve_takeovers", "Calls that went on with a request of an earlier one", ["kind"], registry=registry
        )
        self.handed_over = Counter(
            "splitserve_handed_over_attempts",
            "Attempts that a draining worker ended, to go on elsewhere",
            registry=registry,
        )
        self.tokens = Counter("splitserve_streamed_tokens", "Tokens streamed to clients", registry=registry)
        self.duplicate_tokens = Counter(
            "splitserve_duplicate_tokens", "Token messages dropped as already seen", registry=registry
        )
        self.stale_messages = Counter(
            "splitserve_router_stale_messages", "Worker messages dropped: of no live attempt", registry=registry
        )
        self.local_prefills = Counter(
            "splitserve_router_local_prefills",
            "Attempts whose prompt was computed on the decode worker although prefill workers live",
            registry=registry,
        )
        self.remote_prefills = Counter(
            "splitserve_router_remote_prefills", "Attempts whose prompt went to a prefill worker", registry=registry
        )
        self.expected_cached_tokens = Counter(
            "splitserve_router_expected_cached_tokens",
            "Prompt tokens that the prefix index said the computing worker holds",
            registry=registry,
        )
        self.prefix_blocks = Gauge(
            "splitserve_router_prefix_blocks", "Blocks in the router's prefix index", registry=registry
        )
        self.links = LinkMetrics()
        self.links.publish(registry)
        self.tokenizations = Counter("splitserve_tokenizations", "Texts tokenised", registry=registry)
        self.workers = Gauge("splitserve_ready_workers", "Workers ready", ["role"], registry=registry)
        self.ttft_seconds = Histogram(
            "splitserve_ttft_seconds", "Arrival to first token", buckets=_SECONDS, registry=registry
        )
        self.tpot_seconds = Histogram(
            "splitserve_tpot_seconds",
            "(End to end - TTFT) / (tokens - 1)",
            buckets=_SECONDS,
            registry=registry,
        )


def new_registry() -> CollectorRegistry:
    """A registry of its own, so that two roles in one process (tests) never collide."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry
