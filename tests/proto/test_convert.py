import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.core.errors import BY_CODE, InvalidRequest, ProtocolMismatch
from splitserve.core.logprobs import TokenLogprob, TopLogprob
from splitserve.core.request import FormatKind, OutputFormat, Request, SamplingParams
from splitserve.proto import inference_pb2, kv_transfer_pb2, worker_pb2
from splitserve.proto.convert import (
    PROTOCOL_VERSION,
    check_protocol,
    failure_from_proto,
    failure_to_proto,
    format_from_proto,
    logprob_from_proto,
    logprob_to_proto,
    request_from_proto,
    request_to_proto,
    sampling_from_proto,
    transport_name,
)

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=20).map(tuple)
sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 1000),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    seed=st.integers(0, 2**63 - 1),
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-100, 100), max_size=5).map(
        lambda biases: tuple(sorted(biases.items()))
    ),
)
formats = st.one_of(
    st.none(),
    st.just(OutputFormat(kind=FormatKind.JSON_OBJECT)),
    st.builds(
        OutputFormat,
        kind=st.sampled_from([kind for kind in FormatKind if kind is not FormatKind.JSON_OBJECT]),
        source=st.text(min_size=1, max_size=20),
    ),
)
counts = st.none() | st.integers(0, 20)
requests = st.builds(
    Request,
    request_id=st.text(min_size=1, max_size=20),
    prompt_token_ids=tokens,
    output_token_ids=tokens,
    max_tokens=st.integers(0, 2**31),
    sampling=sampling,
    stop_token_ids=st.frozensets(st.integers(0, 2**31), max_size=5),
    attempt=st.integers(1, 100),
    priority=st.integers(-(2**31), 2**31 - 1),
    timeout_s=st.floats(0, 1e6),
    waited_s=st.floats(0, 1e6),
    tenant=st.text(max_size=8),
    min_tokens=st.integers(0, 2**31),
    logprobs=counts,
    prompt_logprobs=counts,
    output_format=formats,
)


@given(requests)
def test_a_request_crosses_the_wire_whole(request: Request) -> None:
    data = request_to_proto(request, request.timeout_s, request.waited_s).SerializeToString()
    assert request_from_proto(worker_pb2.WorkRequest.FromString(data)) == request


def test_unset_sampling_fields_mean_greedy_and_off() -> None:
    assert sampling_from_proto(inference_pb2.SamplingParams()) == SamplingParams()


def test_an_empty_output_format_is_refused() -> None:
    for empty in (inference_pb2.OutputFormat(), inference_pb2.OutputFormat(json_object=False)):
        with pytest.raises(InvalidRequest, match="output format is empty"):
            format_from_proto(empty)
    with pytest.raises(InvalidRequest, match="has no text"):
        format_from_proto(inference_pb2.OutputFormat(regex=""))


def test_a_logprob_crosses_the_wire_whole() -> None:
    top = TopLogprob(token_id=3, logprob=-0.5, text=b"\xe2\x82")
    row = TokenLogprob(token_id=7, logprob=-1.25, rank=2, text=b"a", top=(top,))
    assert logprob_from_proto(logprob_to_proto(row)) == row


def test_an_explicit_zero_is_not_unset() -> None:
    with pytest.raises(InvalidRequest, match="top_p"):
        sampling_from_proto(inference_pb2.SamplingParams(top_p=0.0))


def test_a_work_request_without_a_name_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="request_id"):
        request_from_proto(worker_pb2.WorkRequest(attempt=1))


def test_a_protocol_of_the_future_is_refused_and_the_past_is_not() -> None:
    check_protocol(0, "client")
    check_protocol(PROTOCOL_VERSION, "client")
    with pytest.raises(ProtocolMismatch, match=f"version {PROTOCOL_VERSION + 1}"):
        check_protocol(PROTOCOL_VERSION + 1, "client")


@pytest.mark.parametrize("code", BY_CODE)
def test_failures_keep_their_type(code: str) -> None:
    error = BY_CODE[code]("why", retry_after_s=2.0, field="prompt")
    again = failure_from_proto(failure_to_proto(error))
    assert type(again) is type(error)
    assert (again.message, again.retry_after_s, again.field) == ("why", 2.0, "prompt")


def test_transports_are_told_by_their_names() -> None:
    assert [transport_name(value) for value in sorted(kv_transfer_pb2.Transport.values())] == [
        "unspecified", "grpc", "shared_memory", "cuda_ipc", "nccl", "gloo"
    ]  # fmt: skip
    assert transport_name(77) == "unknown"
