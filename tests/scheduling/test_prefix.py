"""Prefix hashes: equal for equal prefixes under equal conditions, and for nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.core.kv_geometry import PREFIX_UNIT
from splitserve.scheduling.prefix import extend_hashes, prefix_hashes, prefix_namespace

ROOT = prefix_namespace(model_id="m", kv_dtype="float32")
tokens = st.lists(st.integers(0, 2**31), max_size=80)


@given(tokens)
def test_one_hash_per_full_unit(token_ids: list[int]) -> None:
    assert len(prefix_hashes(token_ids, ROOT)) == len(token_ids) // PREFIX_UNIT


@given(tokens, tokens)
def test_hashes_agree_exactly_on_the_common_units(first: list[int], second: list[int]) -> None:
    for i, (a, b) in enumerate(zip(prefix_hashes(first, ROOT), prefix_hashes(second, ROOT), strict=False)):
        end = (i + 1) * PREFIX_UNIT
        assert (a == b) == (first[:end] == second[:end])


@given(tokens, st.integers(0, 80))
def test_extending_equals_hashing_at_once(token_ids: list[int], cut: int) -> None:
    hashes = prefix_hashes(token_ids[:cut], ROOT)
    extend_hashes(hashes, token_ids, ROOT)
    assert hashes == prefix_hashes(token_ids, ROOT)


@pytest.mark.parametrize(
    "other",
    [
        {"model_id": "n", "kv_dtype": "float32"},
        {"model_id": "m", "kv_dtype": "bfloat16"},
        {"model_id": "m", "kv_dtype": "float32", "tenant": "t"},
        {"model_id": "m", "kv_dtype": "float32", "codec": "int8"},
        {"model_id": "mf", "kv_dtype": "loat32"},  # fields are not simply run together
    ],
)
def test_other_weights_dtypes_tenants_and_codecs_never_match(other: dict[str, str]) -> None:
    prompt = list(range(32))
    assert not set(prefix_hashes(prompt, ROOT)) & set(prefix_hashes(prompt, prefix_namespace(**other)))
