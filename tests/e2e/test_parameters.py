"""Every parameter together with every other: the same answers from two workers as from one, however they are busy."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
from splitserve.client import FinishReason, GenerationResult, InvalidRequest
from splitserve.engine.testing import EOS_TOKEN_ID

from .conftest import Cluster, StartCluster
from .pairwise import all_pairs

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}, "n": {"enum": [1, 22, None]}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
REGEX = "[a-f]{3,9}(x|yz)?"
GRAMMAR = 'start: word ("," word)*\nword: /[a-c]{2}/ | "é"'
PARAMETERS: dict[str, list[Any]] = {
    "prompt": ["short", "long " * 30],
    "max_tokens": [48, 1],
    "temperature": [0.0, 0.8, 1.5],
    "top_k": [0, 5],
    "top_p": [1.0, 0.8],
    "min_p": [0.0, 0.05],
    "repetition_penalty": [1.0, 1.3],
    "presence_penalty": [0.0, 1.0],
    "frequency_penalty": [0.0, -0.5],
    "logit_bias": [{}, {EOS_TOKEN_ID: 6.0, 3: -100.0}],
    "min_tokens": [0, 7],
    "stop": [[], ["ab", "e"]],
    "stop_token_ids": [[], [5, 70]],
    "ignore_eos": [False, True],
    "logprobs": [None, 0, 4],
    "prompt_logprobs": [None, 2],
    "format": [{}, {"json_schema": SCHEMA}, {"json_object": True}, {"regex": REGEX}, {"grammar": GRAMMAR}],
}


def allowed(row: Mapping[str, Any]) -> bool:
    return not (row.get("format") and row.get("ignore_eos")) and row.get("min_tokens", 0) <= row.get("max_tokens", 48)


ROWS = all_pairs(PARAMETERS, allowed)


async def answer(cluster: Cluster, row: Mapping[str, Any], seed: int) -> GenerationResult:
    options = {name: value for name, value in row.items() if name not in ("prompt", "format")}
    return await cluster.client.generate(row["prompt"], seed=seed, **options, **row["format"])


async def answers(cluster: Cluster) -> list[GenerationResult]:
    results = await asyncio.gather(*(answer(cluster, row, seed) for seed, row in enumerate(ROWS)))
    await cluster.idle()
    return results


def check(row: Mapping[str, Any], result: GenerationResult) -> None:
    """What the parameters promise about one answer."""
    num_tokens = len(result.token_ids)
    assert num_tokens <= row["max_tokens"]
    if row["logprobs"] is not None:
        assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
        assert all(len(entry.top) == row["logprobs"] for entry in result.logprobs)
    else:
        assert not result.logprobs
    if row["prompt_logprobs"] is not None:
        assert b"".join(entry.text for entry in result.prompt_logprobs).decode() == row["prompt"]
        assert [entry.rank == 0 for entry in result.prompt_logprobs] == [True] + [False] * (len(row["prompt"]) - 1)
    else:
        assert not result.prompt_logprobs
    if result.finish_reason is not FinishReason.STOP:
        assert num_tokens == row["max_tokens"]
        return
    if result.token_ids[-1] == EOS_TOKEN_ID:
        assert not row["ignore_eos"]
        check_format(row["format"], result.text)
        assert row["format"] or num_tokens > row["min_tokens"]
    else:
        assert row["stop"] or row["stop_token_ids"]
        assert num_tokens > row["min_tokens"] or row["format"]


def check_format(output_format: Mapping[str, Any], text: str) -> None:
    match output_format:
        case {"json_schema": schema}:
            jsonschema.validate(json.loads(text), schema)
        case {"json_object": True}:
            assert isinstance(json.loads(text), dict)
        case {"regex": regex}:
            assert re.fullmatch(regex, text)
        case {"grammar": _}:
            assert re.fullmatch("([a-c]{2}|é)(,([a-c]{2}|é))*", text)


def same(ours: GenerationResult, theirs: GenerationResult) -> None:
    assert ours.token_ids == theirs.token_ids
    assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
    for mine, other in ((ours.logprobs, theirs.logprobs), (ours.prompt_logprobs, theirs.prompt_logprobs)):
        assert [(e.token_id, e.rank, e.text) for e in mine] == [(e.token_id, e.rank, e.text) for e in other]
        assert [e.logprob for e in mine] == pytest.approx([e.logprob for e in other], abs=1e-4)


def test_the_table_holds_every_pair() -> None:
    names = list(PARAMETERS)
    for first in names:
        for second in names[names.index(first) + 1 :]:
            for a in PARAMETERS[first]:
                for b in PARAMETERS[second]:
                    met = any(row[first] == a and row[second] == b for row in ROWS)
                    assert met or not allowed({first: a, second: b}), (first, a, second, b)


async def test_each_combination_answers_alike_split_colocated_alone_and_preempted(start_cluster: StartCluster) -> None:
    together = await answers(await start_cluster(transports=("grpc",)))
    for row, result in zip(ROWS, together, strict=True):
        check(row, result)
    colocated = await start_cluster(prefill=0, decode=0, colocated=1)
    alone = [await answer(colocated, row, seed) for seed, row in enumerate(ROWS)]
    # So few blocks that sequences are preempted and computed again in the middle of their answers.
    scarce = await start_cluster(prefill=0, decode=0, colocated=1, decode_blocks=24)
    preempted = await answers(scarce)
    assert scarce.engines[0].preemptions > 0
    for ours, theirs, others in zip(together, alone, preempted, strict=True):
        same(ours, theirs)
        same(ours, others)
    assert {result.finish_reason for result in together} == set(FinishReason)


async def test_a_resumed_answer_goes_on_in_its_format_with_its_logprobs(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    options = {"temperature": 1.2, "seed": 5, "regex": "[a-z]{20}", "max_tokens": 40, "logprobs": 1}
    whole = await cluster.client.generate("resume", **options)
    assert re.fullmatch("[a-z]{20}", whole.text)
    for received in (1, 7, 20):
        rest = await cluster.client.generate("resume", received_token_ids=whole.token_ids[:received], **options)
        assert rest.token_ids == whole.token_ids[received:]
        assert [entry.token_id for entry in rest.logprobs] == list(rest.token_ids)


async def test_an_answer_survives_its_decode_worker_in_its_format_with_its_logprobs(
    start_cluster: StartCluster,
) -> None:
    cluster = await start_cluster(prefill=2, decode=2)
    options = {"temperature": 1.2, "seed": 5, "regex": "[a-z]{400}", "max_tokens": 500, "logprobs": 1}
    undisturbed = await cluster.client.generate("survive", **options, prompt_logprobs=0)
    async with cluster.client.stream("survive", **options, prompt_logprobs=0) as stream:
        first = await anext(aiter(stream))
        busy = next(name for name in ("decode-0", "decode-1") if cluster.host(name).num_runs)
        await cluster.workers[busy].worker.stop()
        chunks = [first, *[chunk async for chunk in stream]]
        result = await stream.result()
    assert result.token_ids == undisturbed.token_ids
    assert re.fullmatch("[a-z]{400}", result.text)
    assert [entry.token_id for chunk in chunks for entry in chunk.logprobs] == list(result.token_ids)
    assert [entry.token_id for entry in result.prompt_logprobs] == [
        entry.token_id for entry in undisturbed.prompt_logprobs
    ]
    assert result.timing.attempts == 2


async def test_received_tokens_that_do_not_fit_the_format_are_an_error(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    with pytest.raises(InvalidRequest, match="the regex cannot be followed") as caught:
        await cluster.client.generate("a", regex="[0-9]+", received_token_ids=[66], max_tokens=8)
    assert caught.value.field == "output_format"
    await cluster.idle()


@pytest.mark.verify
async def test_every_answer_that_ends_by_itself_fits_its_format(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    formats = PARAMETERS["format"][1:]
    ended = 0
    for begin in range(0, 1000, 50):
        options = {"temperature": 1.5, "max_tokens": 400, "logit_bias": {EOS_TOKEN_ID: 3.0}}
        jobs = [
            cluster.client.generate(f"answer {seed}", seed=seed, **options, **formats[seed % len(formats)])
            for seed in range(begin, begin + 50)
        ]
        for seed, result in enumerate(await asyncio.gather(*jobs), begin):
            if result.finish_reason is FinishReason.STOP:
                ended += 1
                check_format(formats[seed % len(formats)], result.text)
    assert ended >= 700, ended
