"""llama.cpp's converter, for tokenizers that it does not know: `to_gguf.py LLAMA_CPP_FOLDER MODEL --outfile OUT ...`.

It recognises tokenizers by a digest and refuses others, though prompts here are tokens and never text.
"""

from __future__ import annotations

import runpy
import sys

source = sys.argv.pop(1)
sys.path[:0] = [source, f"{source}/gguf-py"]

from conversion import base  # noqa: E402

base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
sys.argv[0] = f"{source}/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
