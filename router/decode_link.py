"""A session with a decode worker, colocated ones included: grants, transfers and tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio

from ..core.errors import ProtocolMismatch
from ..core.garbage import garbage
from ..core.request import Request
from ..proto import worker_pb2, worker_pb2_grpc
from ..proto.convert import logprob_from_proto, reason_from_proto, request_to_proto, transport_name
from ..scheduling.attempts import NewTokens
from ..scheduling.decode_pace import DecodePace
from ..scheduling.routing import DecodeLoad, PrefillLoad
from ..scheduling.step_times import MeasuredTimes, StepTimes
from .prefill_link import PrefillLink
from .session import DecodeReport, TransferReport, WorkerLink

_WRITTEN_S = 1e-3  # after a step's tokens came: by then they are on their way to the clients


class DecodeLink(WorkerLink):
    """A decode or colocated worker. The load of a run is its KV blocks until the next status counts them, then 0.

    Args: pace: tells how many sequences it may have.
    """

    role = "decode"

    def __init__(self, *args: Any, pace: DecodePace) -> None:
        super().__init__(*args)
        self._pace = pace
        self._has_refused = False  # the last grant that it was asked for
        self._local_tokens: dict[str, int] = {}  # of prompts sent to be computed here, until they have a token
        self.assumed_prefill_tokens_per_s = 0.0  # what others do on average

    @property
    def takes_work(self) -> bool:
        return super().takes_work and self._pace.has_room(self._num_sequences)

    @property
    def colocated(self) -> bool:
        return self.info is not None and self.info.role == worker_pb2.ROLE_COLOCATED

    @property
    def shown_role(self) -> str:
        return "colocated" if self.colocated else self.role

    @property
    def block_size(self) -> int:
        return (self.info.block_size if self.info is not None else 0) or 16

    def will_grant(self, request: Request) -> bool:
        """Whether a grant for the request is all but certain."""
        headroom = self.info.grant_headroom_tokens if self.info is not None else 0
        return not self._has_refused and self.load.has_ample_room(request.num_tokens + headroom)

    @property
    def times(self) -> StepTimes:
        """Its steps as it measured them; until it has computed a prompt, as fast as prefill workers do."""
        return MeasuredTimes(
            prefill_tokens_per_s=self.status.prefill_tokens_per_s or self.assumed_prefill_tokens_per_s,
            decode_step_time_s=self.status.decode_step_s,
            decode_batch=self.status.decode_batch,
        )

    @property
    def load(self) -> DecodeLoad:
        available = self.status.num_free_blocks + self.status.num_cached_blocks
        return DecodeLoad(
            worker=self.address,
            group=self.group,
            available_blocks=available - sum(self.runs.values()),
            num_sequences=self._num_sequences,
            num_blocks=self.status.num_blocks,
            block_size=self.block_size,
            local_prefill_tokens=max(self.status.num_outstanding_prefill_tokens, sum(self._local_tokens.values())),
            times=self.times,
            colocated=self.colocated,
            prefills_locally=self.info is not None and self.info.local_prefill,
            place=self.place,
        )

    @property
    def _num_sequences(self) -> int:
        return max(self.status.num_running + self.status.num_waiting, len(self.runs))

    @property
    def prefill_load(self) -> PrefillLoad:
        """As one that computes prompts itself."""
        sent = sum(self.runs.values()) * self.block_size  # since the last status
        return PrefillLoad(
            worker=self.address,
            outstanding_tokens=self.status.num_outstanding_prefill_tokens + sent,
            outstanding_prompts=self.status.num_waiting,
            tokens_per_s=self.status.prefill_tokens_per_s,
            assumed_tokens_per_s=self.assumed_prefill_tokens_per_s,
        )

    def request_grant(
        self,
        request: Request,
        timeout_s: float,
        waited_s: float,
        prefill: PrefillLink,
        prompt_ids: Sequence[int] = (),
        *,
        can_wait: bool = False,
    ) -> None:
        """Args: can_wait: for some milliseconds, in which the prompt is being computed."""
        message = worker_pb2.DecodeSessionRequest()
        asked = message.grant
        request_to_proto(request, timeout_s, waited_s, asked.request, prompt_ids)
        asked.kv_address, asked.prefill_boot_id, asked.can_wait = prefill.kv_address, prefill.boot_id, can_wait
        if prefill.info is not None:
            asked.kv_rank_addresses.extend(prefill.info.kv_rank_addresses)
            asked.prefill_kv_dtype = prefill.info.kv_dtype
        self._outbox.put_nowait(message)

    def run_local(
        self, request: Request, timeout_s: float, waited_s: float, num_tokens: int, prompt_ids: Sequence[int] = ()
    ) -> None:
        """Have it compute the prompt, of which its cache lacks `num_tokens`, and answer."""
        self._local_tokens[request.request_id] = num_tokens
        message = worker_pb2.DecodeSessionRequest()
        request_to_proto(request, timeout_s, waited_s, message.run.request, prompt_ids)
        self._outbox.put_nowait(message)

    def _send(self, **message: Any) -> None:
        self._outbox.put_nowait(worker_pb2.DecodeSessionRequest(**message))

    def _open(self, channel: grpc.aio.Channel, requests: AsyncIterator[Any]) -> Any:
        return worker_pb2_grpc.DecodeWorkerStub(channel).DecodeSession(requests)

    def _status(self, status: worker_pb2.WorkerStatus) -> None:
        self.runs = dict.fromkeys(self.runs, 0)
        self._pace.report(status.num_running, status.decode_step_s)
        super()._status(status)

    def _received(self, kind: str, message: Any) -> None:
        if kind == "tokens":
            for entry in message.sequences:
                self._decoded(entry)
            asyncio.get_running_loop().call_later(_WRITTEN_S, garbage.collect)
        elif kind == "grant":
            self._has_refused = False
            self._events.granted(self, message)
        elif kind == "transfer_done":
            self._events.transferred(
                self,
                NewTokens(
                    request_id=message.request_id,
                    attempt=message.attempt,
                    index=message.index,
                    token_ids=(message.first_token_id,),
                ),
                TransferReport(
                    transport=transport_name(message.transport),
                    num_bytes=message.num_bytes,
                    transfer_s=message.transfer_s,
                    exposed_s=message.transfer_exposed_s,
                ),
            )

    def refused(self) -> None:
        """It has no room for a grant right now."""
        self.full = self._has_refused = True

    def detach(self, request_id: str) -> None:
        self._local_tokens.pop(request_id, None)
        super().detach(request_id)

    def _decoded(self, entry: worker_pb2.SequenceTokens) -> None:
        if entry.logprobs and len(entry.logprobs) != len(entry.token_ids):
            raise ProtocolMismatch(f"{self.address} sent {len(entry.token_ids)} tokens, {len(entry.logprobs)} logprobs")
        self._local_tokens.pop(entry.request_id, None)
        tokens = NewTokens(
            request_id=entry.request_id,
            attempt=entry.attempt,
            index=entry.index,
            token_ids=tuple(entry.token_ids),
            finish_reason=reason_from_proto(entry.finish_reason),
            logprobs=tuple(map(logprob_from_proto, entry.logprobs)),
            prompt_logprobs=tuple(map(logprob_from_proto, entry.prompt_logprobs)),
        )
        report = None
        if entry.HasField("report"):
            report = DecodeReport(
                queue_s=entry.report.queue_s,
                prefill_s=entry.report.prefill_s,
                preemptions=entry.report.preemptions,
                num_cached_tokens=entry.report.num_cached_tokens,
            )
        self._events.decoded(self, tokens, report)
