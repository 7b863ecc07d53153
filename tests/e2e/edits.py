"""Eight operators edit a policy over HTTP while clients are being answered."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx

from configs.settings import Settings
from tests.e2e.service import ADMIN, USER, url

EDITORS, EDITS = 8, 10
WRONG = [
    ({"kind": "fixed", "depth": 65}, "depth"),
    ({"kind": "goodput", "margin": -1}, "margin"),
    ({"kind": "threshold", "steps": [{"up_to_running": 4, "depth": 1, "colour": "red"}]}, "steps.0.colour"),
    ({"kind": "best"}, "kind"),
]


def edit(address: str, editor: int) -> list[tuple[int, dict]]:
    """One operator's edits, a wrong one among them now and then: (status, answer) of each."""
    answers = []
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60) as http:
        for number in range(EDITS):
            body = {"kind": "fixed", "depth": number % 4, "width": 1 + editor}
            wanted = WRONG[editor % len(WRONG)][0] if number == 5 else body
            answer = http.put("/admin/policies/toy", params={"why": f"{editor}-{number}"}, json=wanted)
            answers.append((answer.status_code, answer.json()))
    return answers


def asking(address: str, stop: threading.Event) -> set[str]:
    """Texts of one prompt, asked again and again."""
    texts = set()
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {USER}"}, timeout=60) as http:
        while not stop.is_set():
            answer = http.post("/v1/completions", json={"model": "toy", "prompt": "The", "max_tokens": 24, "seed": 3})
            assert answer.status_code == 200, answer.text
            texts.add(answer.json()["choices"][0]["text"])
    return texts


def edited(settings: Settings) -> list[dict]:
    """The history after all editors did what they wanted while clients asked. Whatever the policy, those got one text."""
    address, stop = url(settings), threading.Event()
    with ThreadPoolExecutor(EDITORS + 4) as crowd:
        clients = [crowd.submit(asking, address, stop) for _ in range(4)]
        answers = [one for found in crowd.map(edit, [address] * EDITORS, range(EDITORS)) for one in found]
        stop.set()
        texts = set.union(*(client.result() for client in clients))
    assert len(texts) == 1, "the text does not depend on the policy"
    refused = [body["error"] for status, body in answers if status == 400]
    assert len(refused) == EDITORS and {error["param"] for error in refused} == {field for _, field in WRONG}
    assert sum(status == 200 for status, _ in answers) == EDITORS * (EDITS - 1)
    history = list(told(settings, "/admin/policies/toy/history")["history"])
    check(history)
    return history


def check(history: list[dict]) -> None:
    """Complete and in order, each change from what the one before it left, none of the wrong ones among them."""
    assert [entry["version"] for entry in history] == list(range(1, len(history) + 1))
    assert {entry["why"] for entry in history} == {f"{e}-{n}" for e in range(EDITORS) for n in range(EDITS) if n != 5}
    assert all(after["from"] == before["to"] and after["at"] >= before["at"] for before, after in pairwise(history))
    assert {entry["who"] for entry in history} == {"boss"}


def told(settings: Settings, path: str) -> dict:
    answer = httpx.get(url(settings) + path, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()
