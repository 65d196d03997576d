"""Judges the frames of one transfer: nothing but the granted KV, whole, once, unchanged and in order, passes."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import DecodeError

from ..core.errors import KvCorrupted
from ..core.kv_geometry import KvGeometry
from ..proto import kv_transfer_pb2
from .codecs import WireFormat
from .frames import HEADER_BYTES, FrameHeader, RunningDigest, checksum
from .grants import Grant
from .ranges import Route
from .wire import payload_bytes


class Incoming:
    """State of one transfer on the receiving side; pure.

    Args:
        geometry: of the whole model.
        route: which heads are due from this sender.
        wire: how they travel.
    """

    def __init__(
        self, grant: Grant, geometry: KvGeometry, route: Route, wire: WireFormat, token_ids: Sequence[int]
    ) -> None:
        self._grant = grant
        self._geometry = geometry
        self._route = route
        self._wire = wire
        # Tokens that have come, per layer; of a layer that another rank sends, none are due.
        self._covered = [grant.num_cached_tokens if heads else grant.num_tokens for heads in route.heads]
        self._digest = RunningDigest(grant, token_ids)
        self.num_frames = 0
        self.num_bytes = 0

    def is_stale(self, header: FrameHeader) -> bool:
        """The frame belongs to another grant, attempt or epoch."""
        grant = self._grant
        return (header.grant_id, header.attempt, header.epoch) != (grant.grant_id, grant.attempt, grant.epoch)

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
        for layer in self._layers(header):
            self._covered[layer] = part.token_end
        self.num_bytes += payload_bytes(self._geometry, self._wire, part)
        self.num_frames += 1
        self._digest.add(frame[:HEADER_BYTES])

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
            raise KvCorrupted(f"{self._grant}: a checksum is wrong; the KV was damaged on its way")
        self._digest.add_checksums(checksums)
        if end.digest != self.digest:
            raise KvCorrupted(f"{self._grant}: the digest is wrong; the KV is of another prompt or was damaged")
        return end

    @property
    def digest(self) -> bytes:
        return self._digest.digest()

    def _layers(self, header: FrameHeader) -> range:
        return range(header.part.layer_start, min(header.part.layer_end, self._geometry.num_layers))

    def _check_sequence(self, header: FrameHeader) -> None:
        if header.sequence != self.num_frames:
            raise KvCorrupted(f"{self._grant}: frame {header.sequence} came where {self.num_frames} was due")
