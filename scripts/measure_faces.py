"""Say which faces are found in each photo of a folder, and how long that takes.

python scripts/measure_faces.py PHOTOS_DIR
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    """Print one line a photo, and the processor time of one on average."""
    from fastsd_helpers.images.faces import find_faces
    from fastsd_helpers.images.files import read_rgb

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, metavar="PHOTOS_DIR")
    paths = [path for path in sorted(parser.parse_args().photos.rglob("*")) if path.is_file()]
    spent, found = 0.0, 0
    for path in paths:
        photo = read_rgb(path)
        began = time.process_time()
        faces = find_faces(photo)[1]
        spent += time.process_time() - began
        found += len(faces)
        print(f"{path.name} {photo.width} x {photo.height}: {[tuple(map(round, face)) for face in faces]}")
    print(f"{found} faces in {len(paths)} photos, {1000 * spent / max(1, len(paths)):.0f} ms of processor time each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
