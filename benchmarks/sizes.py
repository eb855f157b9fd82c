"""What a device's file of Grok-1 takes, by mesh and precision, in gigabytes."""

from grokctl.checkpoint.layout import device_layouts
from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision

MESHES = (*(MeshShape(1, size) for size in (1, 2, 4, 8, 16)), MeshShape(2, 8))


def main() -> None:
    """Print the table; every device's file is as large as the others of its mesh."""
    own = released_storage(GROK_1)
    print("| devices | " + " | ".join(Precision) + " |")
    print("| --- |" + " ---: |" * len(Precision))
    for mesh in MESHES:
        cells = []
        for precision in Precision:
            storage = storage_in(own, precision, mesh)
            sizes = {layout.nbytes for layout in device_layouts(storage, mesh)}
            assert max(sizes) - min(sizes) < 2**16, sizes
            cells.append(f"{max(sizes) / 1e9:.2f} GB")
        name = f"{mesh.size}, {mesh}" if mesh.expert > 1 else str(mesh.size)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
