"""The configuration, turned once into the frozen options of one process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.address import check_address
from ..core.config import ClusterConfig, WorkerRole
from ..core.errors import ConfigError
from ..engine.options import EngineOptions
from ..proto.tls import Tls
from ..worker.options import WorkerOptions
from .exposure import check_exposure

if TYPE_CHECKING:
    from ..router.server import RouterOptions

CONTROLLER_KEY = "SPLITSERVE_CONTROLLER_KEY_SHA256"  # from the controller to the routers that it starts

_TRANSPORTS = {
    "auto": ("cuda_ipc", "shared_memory", "grpc"),
    "grpc": ("grpc",),
    "shared-memory": ("shared_memory",),
    "cuda-ipc": ("cuda_ipc",),
    "gloo": ("gloo",),
    "nccl": ("nccl", "grpc"),  # what is no GPU, or cannot join, still gets its KV
}


def worker_options(
    config: ClusterConfig,
    role: WorkerRole,
    *,
    host: str,
    port: int,
    metrics_port: int,
    worker_id: str,
    num_threads: int | None,
    kv_address: str = "",
    labels: Mapping[str, str] | None = None,
) -> WorkerOptions:
    """Raises: ConfigError: a value that only the engine can judge is wrong."""
    if kv_address:
        check_address(kv_address, "--kv-address")
    engine = config.engine
    transports = _TRANSPORTS[config.transport]
    device = engine.device or ("cuda" if config.pool(role).gpus else "cpu")
    on_gpu = device != "cpu"
    ranks = config.tensor_parallel(role)
    tls = tls_of(config, "decode" if role == "colocated" else role)
    check_exposure(host, tls, required=config.security.tls_required)
    if tls is not None and config.transport in ("gloo", "nccl"):
        raise ConfigError(
            f"transport {config.transport} does not encrypt: it cannot be used with TLS; take grpc, or auto"
        )
    return WorkerOptions(
        engine=EngineOptions(
            model=config.model,
            device=device,
            tensor_parallel=ranks,
            dtype=engine.dtype,
            random_weights=engine.random_weights,
            block_size=engine.block_size,
            num_kv_blocks=engine.num_kv_blocks,
            kv_memory_bytes=engine.kv_memory,
            max_model_len=engine.max_model_len,
            max_running=engine.max_running or (256 if on_gpu else 64),
            max_waiting=engine.max_waiting,
            max_step_tokens=engine.max_step_tokens or (8192 if on_gpu else 256),
            gpu_memory_fraction=engine.gpu_memory_fraction,
            cuda_graphs=engine.cuda_graphs,
            decode_headroom_tokens=engine.decode_headroom_tokens,
            prefix_cache=engine.prefix_cache,
            num_threads=num_threads or config.pool(role).threads,
            self_check=engine.self_check,
            shared_pool="shared_memory" in transports and role != "colocated",  # a decode worker may become one
        ),
        role=role,
        labels=labels or {},
        local_prefill=engine.local_prefill,
        host=host,
        port=port,
        metrics_port=metrics_port,
        kv_address=kv_address,
        worker_id=worker_id,
        transports=transports,
        kv_codec=config.kv_codec,
        trace_dir=config.trace_dir,
        drain_timeout_s=config.drain_timeout_s,
        lease_s=config.lease_s,
        tls=tls,
    )


def router_options(
    config: ClusterConfig, *, prefill: tuple[str, ...], decode: tuple[str, ...], metrics_port: int, router_id: str
) -> RouterOptions:
    """Raises: ConfigError: a worker's address is malformed."""
    from ..router.server import RouterOptions  # here, so that worker processes need not load the router

    router = config.router
    tls = tls_of(config, "router")
    check_exposure(router.host, tls, required=config.security.tls_required)
    for address in (*prefill, *decode):
        check_address(address, "a worker's address")
    return RouterOptions(
        model=config.model,
        prefill=prefill,
        decode=decode,
        host=router.host,
        port=router.port,
        http_port=http_port if (http_port := router.http_port_of(0)) >= 0 else None,
        metrics_port=metrics_port,
        router_id=router_id,
        api_key_file=router.api_key_file,
        tls=tls,
        http_client_cert=config.security.http_client_cert,
        policy=router.policy,
        local_prefill_itl_s=router.local_prefill_itl_s,
        controller_key_sha256=os.environ.get(CONTROLLER_KEY, ""),
        max_queued=router.max_queued,
        max_live=router.max_live,
        admission=router.admission,
        ttft_target_s=router.ttft_target_s,
        tpot_target_s=router.tpot_target_s,
        ageing_s=router.ageing_s,
        prefill_bound_s=router.prefill_bound_s,
        max_attempts=router.max_attempts,
        max_worker_deaths=router.max_worker_deaths,
        retry_ratio=router.retry_ratio,
        retry_floor=router.retry_floor,
        keep_answers_s=router.keep_answers_s,
        default_timeout_s=router.default_timeout_s,
        no_worker_wait_s=router.no_worker_wait_s,
        drain_timeout_s=config.drain_timeout_s,
        trace_dir=config.trace_dir,
    )


def tls_of(config: ClusterConfig, role: str) -> Tls | None:
    """The files of a process of this role; None: no TLS."""
    security = config.security
    if security.ca is None or security.cert is None or security.key is None:
        return None
    cert, key = (Path(str(path).replace("{role}", role)) for path in (security.cert, security.key))
    return Tls(ca=security.ca, cert=cert, key=key)
