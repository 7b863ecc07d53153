"""llama.cpp's own server, asked over HTTP: plain, with n-gram drafts, or with a draft model."""

from __future__ import annotations

import atexit
import http.client
import json
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from protocol import Generate, Settings, serve

STARTING = 120.0  # seconds
SPECULATION = {
    "plain": (),
    "ngram": ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "3", "--spec-ngram-simple-size-m", "5"),
    "draft": ("--spec-type", "draft-simple", "--spec-draft-n-max", "4", "-md"),
}


def load(settings: Settings) -> tuple[Generate, Mapping[str, str]]:
    port = free_port()
    server = subprocess.Popen(command(settings, port))
    atexit.register(server.kill)
    await_ready(server, port)
    version = subprocess.run([settings.extra["binary"], "--version"], capture_output=True, text=True)
    hands = ThreadPoolExecutor(settings.requests)

    def generate(prompts: Sequence[Sequence[int]], count: int) -> Sequence[Sequence[int]]:
        return list(hands.map(lambda prompt: complete(port, prompt, count), prompts))

    return generate, {"llama.cpp": (version.stderr + version.stdout).strip().split("\n")[0]}


def command(settings: Settings, port: int) -> list[str]:
    threads, slots = str(settings.threads), settings.requests
    context = str(slots * (settings.longest + 32))
    out = [settings.extra["binary"], "-m", settings.model, "-t", threads, "-tb", threads, "-np", str(slots), "-c", context, "-kvu"]
    out += ["--no-webui", "-ctk", "f32", "-ctv", "f32", "--host", "127.0.0.1", "--port", str(port), *SPECULATION[settings.setting]]
    return out + ([settings.draft] if settings.setting == "draft" else [])


def complete(port: int, prompt: Sequence[int], count: int) -> list[int]:
    """One request's tokens."""
    body = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        found = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    tokens: list[int] = found["tokens"]
    return tokens


def await_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + STARTING
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"llama-server ended with {server.returncode}")
        if ready(port):
            return
        time.sleep(0.1)
    raise TimeoutError("llama-server is not ready")


def ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    serve(load)
