"""What a device's file of Grok-1 takes, by mesh and precision, in gigabytes."""

from grokctl.checkpoint.layout import device_layouts
from grokctl.checkpoint.logical import Storage
from grokctl.checkpoint.storage import DEFAULT_GROUP
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.tensors import TensorSpec, tensor_specs

MESHES = (*(MeshShape(1, size) for size in (1, 2, 4, 8, 16)), MeshShape(2, 8))


def groups(spec: TensorSpec, precision: Precision) -> int:
    """Scale rows of a weight, cut from the release with the default options."""
    match precision:
        case Precision.INT8:
            return spec.scale_groups
        case Precision.INT4 if spec.is_quantized:
            return spec.shape[-2] // DEFAULT_GROUP
    return 0


def main() -> None:
    """Print the table; every device's file is as large as the others of its mesh."""
    specs = tensor_specs(GROK_1)
    print("| devices | " + " | ".join(Precision) + " |")
    print("| --- |" + " ---: |" * len(Precision))
    for mesh in MESHES:
        cells = []
        for precision in Precision:
            storage = Storage(
                config=GROK_1,
                precision=precision,
                groups={spec.name: groups(spec, precision) for spec in specs},
            )
            sizes = {layout.nbytes for layout in device_layouts(storage, mesh)}
            assert max(sizes) - min(sizes) < 2**16, sizes
            cells.append(f"{max(sizes) / 1e9:.2f} GB")
        name = f"{mesh.size}, {mesh}" if mesh.expert > 1 else str(mesh.size)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
