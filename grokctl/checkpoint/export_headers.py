"""The tensors in a file of an export, which anybody may have written."""

from pathlib import Path

from grokctl.checkpoint.gguf import read_gguf
from grokctl.checkpoint.safetensors_header import HeaderTensor, read_safetensors
from grokctl.text import printable


def tensors_in(path: Path) -> tuple[HeaderTensor, ...]:
    """The tensors that a file describes, in order; none in a file of another kind.

    Raises:
        CorruptCheckpointError: Its header is malformed, or does not describe exactly its data.
        OSError: It cannot be read.
    """
    match path.suffix:
        case ".gguf":
            return tuple(
                HeaderTensor(printable(one.name, limit=255), one.type.name, one.shape, one.nbytes)
                for one in read_gguf(path).tensors
            )
        case ".safetensors":
            return read_safetensors(path)
        case _:
            return ()
