"""A session with a prefill worker: runs and first tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio

from ..core.request import Request
from ..proto import kv_transfer_pb2, worker_pb2, worker_pb2_grpc
from ..proto.convert import logprob_from_proto, reason_from_proto, request_to_proto
from ..scheduling.attempts import NewTokens
from ..scheduling.routing import PrefillLoad
from .session import PrefillReport, WorkerLink


class PrefillLink(WorkerLink):
    """A prefill worker. The load of a run is its prompt tokens until the first token is there, then 0."""

    role = "prefill"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.assumed_prefill_tokens_per_s = 0.0  # what prefill workers do on average
        # Of our runs without a first token, and of other routers' as of the last status.
        self._own_tokens = self._own_prompts = 0
        self._sizes: dict[str, int] = {}  # of their prompts, cached tokens included: so the worker counts them
        self._others_tokens = self._others_prompts = 0

    @property
    def kv_address(self) -> str:
        return self.info.kv_address if self.info is not None else ""

    @property
    def takes_late_grants(self) -> bool:
        return self.info is not None and self.info.late_grants

    @property
    def load(self) -> PrefillLoad:
        return PrefillLoad(
            worker=self.address,
            group=self.group,
            outstanding_tokens=self._own_tokens + self._others_tokens,
            outstanding_prompts=self._own_prompts + self._others_prompts,
            own_prompts=self._own_prompts,
            tokens_per_s=self.status.prefill_tokens_per_s,
            assumed_tokens_per_s=self.assumed_prefill_tokens_per_s,
            place=self.place,
        )

    def attach(self, request_id: str, load: int, num_tokens: int = 0) -> None:
        """Of `num_tokens` the worker has `load` to compute, its cache has the rest."""
        self._sizes[request_id] = max(load, num_tokens)
        self._own_tokens += load
        self._own_prompts += load > 0
        super().attach(request_id, load)

    def detach(self, request_id: str) -> None:
        self._computed(request_id)
        super().detach(request_id)

    def prefilled(self, request_id: str) -> None:
        """The run computes no more; it only holds KV until that has moved."""
        self._computed(request_id)
        self.runs[request_id] = 0

    def _computed(self, request_id: str) -> None:
        load = self.runs.get(request_id, 0)
        self._sizes.pop(request_id, None)
        self._own_tokens -= load
        self._own_prompts -= load > 0

    def run(
        self,
        request: Request,
        timeout_s: float,
        waited_s: float,
        grant: kv_transfer_pb2.Grant | None = None,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """Have it compute a prompt. Without a grant, that must follow."""
        message = worker_pb2.PrefillSessionRequest()
        request_to_proto(request, timeout_s, waited_s, message.run.request, prompt_ids)
        if grant is not None:
            message.run.grant.CopyFrom(grant)
        self._outbox.put_nowait(message)

    def grant(self, grant: kv_transfer_pb2.Grant) -> None:
        """Where the KV goes of a run that was sent without."""
        self._send(grant=grant)

    def _send(self, **message: Any) -> None:
        self._outbox.put_nowait(worker_pb2.PrefillSessionRequest(**message))

    def _open(self, channel: grpc.aio.Channel, requests: AsyncIterator[Any]) -> Any:
        self._own_tokens = self._own_prompts = self._others_tokens = self._others_prompts = 0
        self._sizes.clear()
        return worker_pb2_grpc.PrefillWorkerStub(channel).PrefillSession(requests)

    def _status(self, status: worker_pb2.WorkerStatus) -> None:
        self._others_tokens = max(0, status.num_outstanding_prefill_tokens - sum(self._sizes.values()))
        self._others_prompts = max(0, status.num_running + status.num_waiting - self._own_prompts)
        super()._status(status)

    def _received(self, kind: str, message: Any) -> None:
        if kind == "first_token":
            self._events.first_token(
                self,
                NewTokens(
                    request_id=message.request_id,
                    attempt=message.attempt,
                    index=message.index,
                    token_ids=(message.token_id,),
                    finish_reason=reason_from_proto(message.finish_reason),
                    logprobs=(logprob_from_proto(message.logprob),) if message.HasField("logprob") else (),
                    prompt_logprobs=tuple(map(logprob_from_proto, message.prompt_logprobs)),
                ),
                PrefillReport(
                    queue_s=message.prefill_queue_s,
                    prefill_s=message.prefill_s,
                    num_cached_tokens=message.num_cached_tokens,
                    ungranted=message.ungranted,
                ),
            )
