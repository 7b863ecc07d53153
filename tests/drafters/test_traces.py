"""Traces travel unchanged, and what cannot be learned from is refused by name."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from drafters.traces import InvalidTrace, Trace, time_of
from tests.drafters.traced import VOCAB, WIDTH, K, make_trace


def test_a_trace_travels_as_bytes() -> None:
    trace = make_trace(temperature=0.7, tag="law")
    trace = replace(trace, params=replace(trace.params, top_p=0.9, frequency_penalty=0.5, logit_bias={7: -3.0}))
    back = Trace.from_bytes(trace.to_bytes())
    for field in fields(Trace):
        ours, theirs = getattr(trace, field.name), getattr(back, field.name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype if isinstance(ours, torch.Tensor) else ours == theirs
    assert back.nbytes == trace.nbytes == 22 * 4 + 20 * (WIDTH * 2 + K * 6 + 1)


def test_what_bytes_hold_is_ids_and_numbers() -> None:
    """No field of a trace can carry text but the names that the service gave."""
    texts = {field.name for field in fields(Trace) if field.type == "str"}
    assert texts == {"request", "model", "tag", "version"}


def test_when_it_was_is_known_without_reading_it() -> None:
    data = make_trace(at=7.5).to_bytes()
    assert time_of(data) == time_of(data[:-1]) == 7.5
    for torn in (b"", data[:100], data.replace(b"trace", b"grace")):
        with pytest.raises(InvalidTrace, match="not a trace"):
            time_of(torn)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_torn_trace_is_refused(cut: int) -> None:
    with pytest.raises(InvalidTrace, match="not a trace"):
        Trace.from_bytes(make_trace().to_bytes()[:cut])


def test_shapes_that_do_not_fit_are_refused() -> None:
    trace = make_trace()
    for name, value, message in (
        ("tokens", trace.tokens.long(), r"tokens is torch.int64 of shape \[22\], expected int32"),
        ("hidden", trace.hidden[:-1], r"hidden is .* shape \[19, 24\], expected bfloat16 or float16 or float32 of shape \[20, any\]"),
        ("hidden", trace.hidden[0], r"hidden is .* shape \[24\]"),
        ("top_ids", trace.top_ids[:5], r"top_ids is .* shape \[5, 8\], expected int32 of shape \[20, 8\]"),
        ("top_logprobs", trace.top_logprobs[:, :3], r"top_logprobs is .* shape \[20, 3\], expected .* of shape \[20, 8\]"),
        ("accepted", trace.accepted.int(), r"accepted is torch.int32"),
        ("prompt_length", 22, r"prompt_length is 22, expected 0 to 5"),
        ("tokens", trace.tokens[:2], r"tokens has shape \[2\], expected one row of more than 2"),
    ):
        with pytest.raises(InvalidTrace, match=message):
            replace(trace, **{name: value})  # type: ignore[arg-type]


def test_another_base_and_numbers_that_are_none_are_refused() -> None:
    trace = make_trace()
    trace.check(VOCAB, WIDTH)
    with pytest.raises(InvalidTrace, match=r"r-0: tokens has tokens .*; the vocabulary has tokens 0 to 9"):
        trace.check(10, WIDTH)
    with pytest.raises(InvalidTrace, match="hidden is 24 wide, expected the base's hidden size 32"):
        trace.check(VOCAB, 32)
    broken = trace.hidden.clone()
    broken[3, 4] = torch.nan
    with pytest.raises(InvalidTrace, match="hidden has NaN or infinite values"):
        replace(trace, hidden=broken).check(VOCAB, WIDTH)
    for logprobs, message in (
        (trace.top_logprobs * torch.nan, "top_logprobs add up to nan"),
        (trace.top_logprobs.clamp_min(-0.1), "top_logprobs add up to"),
        (trace.top_logprobs.flip(1), "top_logprobs are not in order"),
    ):
        with pytest.raises(InvalidTrace, match=message):
            replace(trace, top_logprobs=logprobs).check(VOCAB, WIDTH)


def test_sampling_parameters_that_cannot_be_are_refused_in_bytes() -> None:
    data = make_trace().to_bytes()
    assert b"temperature" in data
    with pytest.raises(InvalidTrace, match=r"not a trace: TypeError .*xemperature"):
        Trace.from_bytes(data.replace(b"temperature", b"xemperature"))
