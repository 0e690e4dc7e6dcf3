"""Convert a base model to GGUF in float32 with llama.cpp's own converter, without its vocabulary.

The converter refuses tokenizers that it does not know, such as the tests' own. Here tokens go in and come out
as numbers, so their text is not needed.

Run it with `python convert.py <llama.cpp's source> <model directory> <new GGUF file>`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Convert one model; everything else than the vocabulary is the converter's own."""
    source, model, out = map(Path, sys.argv[1:])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    hparams = ModelBase.load_hparams(model, False)
    name_every_token(model / "tokenizer.json", hparams["vocab_size"])
    kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    kind.set_vocab = without_vocabulary
    with torch.inference_mode():
        kind(model, gguf.LlamaFileType.ALL_F32, out).write()


def without_vocabulary(model: Any) -> None:
    """Say how many tokens there are, and nothing of their text."""
    model._set_vocab_none()
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


def name_every_token(tokenizer: Path, n_tokens: int) -> None:
    """Fill up a tokenizer, as Gemma3's converter cuts rows of the embedding that have no token."""
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<unused{i}>": i for i in range(len(vocabulary), n_tokens)}
    tokenizer.write_text(json.dumps(content | {"added_tokens": []}))


if __name__ == "__main__":
    main()
