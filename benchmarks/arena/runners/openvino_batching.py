"""OpenVINO GenAI's continuous batching: plain, with prompt lookup, or with a draft model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import Generate, Settings, serve

BLOCK = 32  # tokens


def load(settings: Settings) -> tuple[Generate, Mapping[str, str]]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = settings.requests * (-(-settings.longest // BLOCK) + 2)
    scheduler.enable_prefix_caching = False
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": settings.threads}
    properties: dict[str, Any] = dict(exact)
    if settings.setting == "lookup":
        properties["prompt_lookup"] = True
    elif settings.setting == "draft":
        properties["draft_model"] = openvino_genai.draft_model(settings.draft, "CPU", **exact)
    pipeline = openvino_genai.ContinuousBatchingPipeline(settings.model, scheduler, "CPU", properties)

    def generate(prompts: Sequence[Sequence[int]], count: int) -> Sequence[Sequence[int]]:
        wish = config(settings, count)
        tensors = [openvino.Tensor(np.array([p], dtype=np.int64)) for p in prompts]
        return [r.m_generation_ids[0] for r in pipeline.generate(tensors, [wish] * len(prompts))]

    return generate, {"openvino-genai": version("openvino-genai"), "openvino": version("openvino")}


def config(settings: Settings, count: int) -> Any:
    out = openvino_genai.GenerationConfig()
    out.max_new_tokens, out.ignore_eos, out.do_sample = count, True, False
    if settings.setting == "lookup":
        out.num_assistant_tokens, out.max_ngram_size = 5, 3
    elif settings.setting == "draft":
        out.num_assistant_tokens = 4
    return out


if __name__ == "__main__":
    serve(load)
