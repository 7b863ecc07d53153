"""transformers: `generate` (a static batch), its prompt lookup (one request only), and `generate_batch` (continuous batching)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from protocol import Generate, Settings, serve
from transformers import AutoModelForCausalLM, GenerationConfig

LOOKUP = 5  # tokens guessed at a time
PAGE = 64  # tokens


def load(settings: Settings) -> tuple[Generate, Mapping[str, str]]:
    torch.set_num_threads(settings.threads)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return (batching(model, settings) if settings.setting == "batching" else static(model, settings)), versions


def static(model: Any, settings: Settings) -> Generate:
    extra = {"prompt_lookup_num_tokens": LOOKUP} if settings.setting == "lookup" else {}

    def generate(prompts: Sequence[Sequence[int]], count: int) -> Sequence[Sequence[int]]:
        ids = torch.tensor([list(p) for p in prompts])
        mask = torch.ones_like(ids)
        config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **extra)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, generation_config=config)
        found: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return found

    return generate


def batching(model: Any, settings: Settings) -> Generate:
    from transformers import ContinuousBatchingConfig

    model.config.eos_token_id = -1
    blocks = -(-settings.requests * settings.longest // PAGE) + settings.requests
    shape = ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=2048, allow_block_sharing=False)

    def generate(prompts: Sequence[Sequence[int]], count: int) -> Sequence[Sequence[int]]:
        config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
        with torch.no_grad():
            out = model.generate_batch(
                [list(p) for p in prompts], config, continuous_batching_config=shape, persistent_manager=True, warmup=False
            )
        texts = {tuple(o.prompt_ids): o.generated_tokens for o in out.values()}
        return [texts[tuple(p)] for p in prompts]

    return generate


if __name__ == "__main__":
    serve(load)
