"""Draw the demo's three subjects: six pictures to teach each, six more to judge by, with captions.

    python scripts/draw_demo_subjects.py

Writes fastsd_helpers/demo/subjects/{subject}/ and .../held_out/{subject}/; the same pictures each time.
"""

from pathlib import Path

import demo_pictures as pictures
import numpy as np

from fastsd_helpers.demo import SUBJECTS_FOLDER


def main() -> None:
    places, backgrounds = list(pictures.PLACES), list(pictures.BACKGROUNDS)
    for number, subject in enumerate(pictures.SUBJECTS):
        generator = np.random.default_rng([2026, number])
        for folder, shift in ((SUBJECTS_FOLDER / subject, 0), (SUBJECTS_FOLDER / "held_out" / subject, 2)):
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(6):
                # The sixth stands where another one stood at night, so that no two look alike.
                place = places[index] if index < 5 else places[3 - shift]
                background = backgrounds[(index + shift) % 6]
                picture = pictures.draw_subject(subject, place, background, generator)
                caption = pictures.subject_caption(subject, place, background)
                save(picture, folder / f"{subject} ({index + 1}).png", caption)


def save(picture, path: Path, caption: str) -> None:
    picture.save(path, optimize=True)
    path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
