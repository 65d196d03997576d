"""Judges the frames of one transfer: nothing but the granted KV, whole, once, unchanged and in order, passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from ..core.errors import KvCorrupted
from ..core.kv_geometry import KvGeometry
from ..proto import kv_transfer_pb2
from .codecs import WireFormat
from .frames import HEADER_BYTES, FrameHeader, KvPart, RunningDigest, checksum
from .grants import Grant
from .ranges import Route
from .wire import payload_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    header: bytes
    part: KvPart
    num_bytes: int
    is_late: bool


class Incoming:
    """State of one transfer on the receiving side, over all of its streams; pure.

    Args:
        geometry: of the whole model.
        route: which heads are due from this sender.
    """

    def __init__(self, grant: Grant, geometry: KvGeometry, route: Route, token_ids: Sequence[int]) -> None:
        self._grant = grant
        self._geometry = geometry
        self._route = route
        self._of_tokens = RunningDigest(grant, token_ids)  # before KV comes: its end is what a token waits for
        self._wire = grant.wire
        self._is_late = False  # whether the stream's checksums come with its end
        self._frames: list[_Frame] = []
        self._covered = self._nothing()
        self.round = 0
        self.digest = b""  # of all, once the end was accepted
        self.end_was_read = False  # undamaged: what it says is what the sender means
        self.first_damaged: int | None = None  # frame whose late checksum was wrong

    def begin(self, round_number: int, wire: WireFormat, *, num_kept: int, late_checksums: bool) -> None:
        """A stream begins. Of what came before, `num_kept` frames stay; the rest will come again."""
        self.round, self._wire, self._is_late = round_number, wire, late_checksums
        self.end_was_read, self.first_damaged = False, None
        del self._frames[num_kept:]
        self._covered = self._nothing()
        for frame in self._frames:
            self._cover(frame.part)

    def is_stale(self, header: FrameHeader) -> bool:
        """The frame belongs to another grant, attempt, epoch or stream."""
        grant = self._grant
        expected = (grant.grant_id, grant.attempt, grant.epoch, self.round)
        return (header.grant_id, header.attempt, header.epoch, header.round) != expected

    @property
    def num_frames(self) -> int:
        return len(self._frames)

    @property
    def num_bytes(self) -> int:
        return sum(frame.num_bytes for frame in self._frames)

    @property
    def late_frames(self) -> list[int]:
        """Sequence numbers of those whose checksums come with the end."""
        return [number for number, frame in enumerate(self._frames) if frame.is_late]

    def accept_data(self, header: FrameHeader, frame: bytes) -> None:
        """Check a data frame's place. Its bytes are checked where they are copied.

        Raises: KvCorrupted: out of sequence, outside the grant, or covering something twice or not in order.
        """
        self._check_sequence(header)
        part, num_layers = header.part, self._geometry.num_layers
        heads = {self._route.heads[layer] for layer in self._layers(header)}
        if (
            not part.layer_start < part.layer_end <= num_layers
            or not part.token_start < part.token_end <= self._grant.num_tokens
            or heads != {range(part.head_start, part.head_end)}
            or header.wire != self._wire
            or any(self._covered[layer] != part.token_start for layer in self._layers(header))
        ):
            raise KvCorrupted(f"{self._grant}: frame {header.sequence} holds {part}, which is not what comes next")
        self._cover(part)
        self._frames.append(
            _Frame(
                header=frame[:HEADER_BYTES],
                part=part,
                num_bytes=payload_bytes(self._geometry, self._wire, part),
                is_late=self._is_late,
            )
        )

    @property
    def is_covered(self) -> bool:
        """All KV was announced; only END is to come."""
        return all(covered == self._grant.num_tokens for covered in self._covered)

    def accept_end(
        self, header: FrameHeader, payload: memoryview, checksums: Sequence[int] = ()
    ) -> kv_transfer_pb2.TransferEnd:
        """Args: checksums: of the data frames, in order, where they come late.

        Raises: KvCorrupted: what was announced is not what arrived.
        """
        self._check_sequence(header)
        if checksum(payload) != header.checksum:
            raise KvCorrupted(f"{self._grant}: the checksum of the last frame is wrong")
        try:
            end = kv_transfer_pb2.TransferEnd.FromString(bytes(payload))
        except DecodeError as error:
            raise KvCorrupted(f"{self._grant}: the last frame cannot be read: {error}") from error
        self.end_was_read = True
        if not end.finished and not self.is_covered:
            raise KvCorrupted(
                f"{self._grant}: the transfer ended with {min(self._covered)} of {self._grant.num_tokens} tokens"
            )
        if (end.num_frames, end.num_bytes) != (self.num_frames, self.num_bytes):
            raise KvCorrupted(
                f"{self._grant}: {self.num_frames} frames with {self.num_bytes} bytes arrived, "
                f"{end.num_frames} with {end.num_bytes} were sent"
            )
        if list(end.checksums) != list(checksums):
            pairs = zip(self.late_frames, end.checksums, checksums, strict=False)
            self.first_damaged = next((number for number, sent, came in pairs if sent != came), None)
            raise KvCorrupted(f"{self._grant}: a checksum is wrong; the KV was damaged on its way")
        self.digest = self._digest(checksums)
        if end.digest != self.digest:
            raise KvCorrupted(f"{self._grant}: the digest is wrong; the KV is of another prompt or was damaged")
        return end

    def _digest(self, late_checksums: Sequence[int]) -> bytes:
        digest = self._of_tokens.copy()
        for frame in self._frames:
            digest.add(frame.header)
        digest.add_checksums(late_checksums)
        return digest.digest()

    def _nothing(self) -> list[int]:
        """Tokens that have come, per layer; of a layer that another rank sends, none are due."""
        grant = self._grant
        return [grant.num_cached_tokens if heads else grant.num_tokens for heads in self._route.heads]

    def _cover(self, part: KvPart) -> None:
        self._covered[part.layer_start : part.layer_end] = [part.token_end] * (part.layer_end - part.layer_start)

    def _layers(self, header: FrameHeader) -> range:
        return range(header.part.layer_start, min(header.part.layer_end, self._geometry.num_layers))

    def _check_sequence(self, header: FrameHeader) -> None:
        if header.sequence != self.num_frames:
            raise KvCorrupted(f"{self._grant}: frame {header.sequence} came where {self.num_frames} was due")
