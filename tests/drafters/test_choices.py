"""What a choice is called tells its request."""

from __future__ import annotations

from drafters.choices import choice_of, request_of, requests


def test_a_choices_name_tells_its_request() -> None:
    for request in ("cmpl-5f3a", "cmpl-5f30", "chatcmpl-9-1f"):
        assert {request_of(choice_of(request, index)) for index in (0, 7, 10, 128)} == {request}
    assert request_of("cmpl-5f3a") == "cmpl-5f3a"  # it is no choice
    assert requests(["cmpl-5f-0", "cmpl-5f-1", "cmpl-5-0", "cmpl-5f-12"]) == 2 and requests([]) == 0
