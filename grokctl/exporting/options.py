"""What can be exported: formats, types, and the options of an export."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Format(StrEnum):
    """The formats of other engines."""

    GGUF = "gguf"
    """llama.cpp, Ollama, LM Studio, and others built on it."""
    HF = "hf"
    """safetensors as SGLang, and vLLM up to 0.24, read them."""


class ExportType(StrEnum):
    """The type of the weights that the release quantises."""

    Q8_0 = "q8_0"
    """The released integers with their scales in float16: lossless."""
    Q4_0 = "q4_0"
    """Four bits with a float16 scale for every 32 inputs; lossless from int4 whose groups are
    multiples of 32."""
    BF16 = "bf16"
    """Integer times scale, rounded to nearest even, as the reference multiplies."""
    F32 = "f32"
    """Integer times scale, exactly: lossless, four times the bytes."""


class EmbeddingType(StrEnum):
    """The type of the embedding, which the release has as float32."""

    F32 = "f32"
    BF16 = "bf16"
    Q8_0 = "q8_0"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options of an export."""

    out: Path
    """The folder to publish; must not exist when the plan is executed."""
    format: Format
    type: ExportType
    embedding: EmbeddingType
    name: str
    """Of the model: a part of the files' names, and shown to people."""
    split: int | None = None
    """Bytes of tensors in a file at most; one file by default."""
    jobs: int | None = None
    """Worker threads; one per core by default."""
    max_memory: int | None = None
    """Bytes of memory for arrays; a quarter of free memory by default."""
