"""ONNX Runtime GenAI's generator: greedy on a static batch, or with n-gram drafts for one request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import numpy as np
import onnxruntime_genai
from protocol import Generate, Settings, serve


def load(settings: Settings) -> tuple[Generate, Mapping[str, str]]:
    config = onnxruntime_genai.Config(settings.model)
    options = {"session_options": {"intra_op_num_threads": settings.threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = onnxruntime_genai.Model(config)

    def generate(prompts: Sequence[Sequence[int]], count: int) -> Sequence[Sequence[int]]:
        length = len(prompts[0])
        params = onnxruntime_genai.GeneratorParams(model)
        end = length + count
        params.set_search_options(max_length=end, min_length=end, batch_size=len(prompts), do_sample=False)
        if settings.setting == "ngram":
            params.set_speculative_options(ngram_size=3, max_draft_tokens=5)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [list(generator.get_sequence(i))[length:end] for i in range(len(prompts))]

    return generate, {"onnxruntime-genai": version("onnxruntime-genai"), "onnxruntime": version("onnxruntime")}


if __name__ == "__main__":
    serve(load)
