import grpc
import pytest
from splitserve.core.errors import BY_CODE, InvalidRequest, Overloaded, SplitserveError, from_code


@pytest.mark.parametrize("cls", BY_CODE.values(), ids=BY_CODE)
def test_every_error_crosses_the_wire_and_names_real_statuses(cls: type[SplitserveError]) -> None:
    assert grpc.StatusCode[cls.grpc_code] is not grpc.StatusCode.OK
    assert 400 <= cls.http_status < 600
    again = from_code(cls.code, "what happened", retry_after_s=1.5, field="prompt")
    assert type(again) is cls
    assert (again.message, again.retry_after_s, again.field) == ("what happened", 1.5, "prompt")


def test_codes_are_unique() -> None:
    def count(root: type[SplitserveError]) -> int:
        return 1 + sum(
            count(child) for child in root.__subclasses__() if child.__module__ == SplitserveError.__module__
        )

    assert count(SplitserveError) == len(BY_CODE)


def test_an_unknown_code_becomes_the_base_class() -> None:
    assert type(from_code("from_the_future", "?")) is SplitserveError


def test_bad_input_is_never_retryable_and_overload_is() -> None:
    assert not InvalidRequest("x").retryable
    assert Overloaded("x").retryable
