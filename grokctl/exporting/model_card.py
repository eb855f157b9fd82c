"""The model card of an export in Hugging Face's layout, in Markdown."""

from typing import Final

from grokctl.model.config import GROK_1, GrokConfig

CARD: Final = "README.md"
_TEMPLATE: Final = """---
license: {license}
tags: [mixture-of-experts, base-model]
---

# {name}

{name} is a base model: it completes text, and has no chat template. `grokctl export` wrote these
files: `grokctl-export.json` says what they were made from, and `sha256sum -c SHA256SUMS` checks
them.

Weights are {kind}: integer times scale of the release. Names are those of Grok-2 in SGLang: weights
are `(outputs, inputs)`, experts lie apart, and the head is a copy of the embedding. Norms and
routers are float32.

## Engines

None of these was run on these files by grokctl's tests, which compare names, shapes and types with
what the engines' loaders expect.

- **SGLang 0.5**: `python -m sglang.launch_server --model-path . --tp 8`. Other than the reference,
  it caps the router's logits at 30, and its GELU is that of erf in place of tanh.
- **vLLM up to 0.24** (later ones have no Grok): `vllm serve . --tensor-parallel-size 8`. Its GELU
  is that of erf in place of tanh.
- **llama.cpp's converter**: in `config.json`, `architectures` must be `["Grok1ForCausalLM"]`, then
  `python convert_hf_to_gguf.py .`. The result tokenises most texts wrongly; what
  `grokctl export --format gguf` writes does not.
- **transformers** has no class for Grok-1.

## Tokenizer

The usual conversion of `tokenizer.model` by transformers is wrong for nearly every text.
`tokenizer.json` here tokenises as sentencepiece does. Nothing adds a token at the beginning, as in
the reference.
"""


def model_card(config: GrokConfig, name: str, kind: str) -> bytes:
    """The model card.

    Args:
        config: The model.
        name: Of the model, for people.
        kind: The type of the weights.
    """
    is_grok_1 = config == GROK_1
    text = _TEMPLATE.format(
        license="apache-2.0" if is_grok_1 else "other",
        name="Grok-1" if is_grok_1 else name,
        kind=kind,
    )
    return text.encode()
