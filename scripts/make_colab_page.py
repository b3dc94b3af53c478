"""Write docs/colab-packages.md: what `fastsd install` adds to each Colab image, from the lock and the images' lists.

python scripts/make_colab_page.py

`scripts/renew_snapshots.py` does the same; a test compares the page with the lock.
"""

from pathlib import Path

from colab_lists import ROOT, SETS, image_names, read_image

from fastsd_helpers.wheels import read_lock

PAGE = ROOT / "docs" / "colab-packages.md"


def colab_page() -> str:
    """The page, one row for each set and what it adds."""
    names = list(reversed(image_names()))
    found: dict[tuple[str, str], list[tuple[str, int]]] = {}  # set and what it adds -> images, megabytes
    for name in names:
        for which in SETS:
            plan = read_image(name).plan(which)
            replaced = [change.name for change in plan.changes if change.before]
            assert not replaced, f"{which} would replace {', '.join(replaced)} of {name}"
            added = ", ".join(sorted(f"{change.name} {change.after}" for change in plan.changes)) or "nothing"
            found.setdefault((which, added), []).append((name, round(plan.bytes / 1e6)))
    rows = [_row(which, added, found[which, added], names) for which in SETS for of, added in found if of == which]
    return "\n".join(
        [
            "# What is added to Colab",
            "",
            f"What `fastsd install` adds to Colab's images, by the lock of {read_lock().made} and the images' lists.",
            "Every other package stays as the image has it, torch, numpy and ipywidgets among them. `trocr-int8`, the",
            "optional engine for CPUs, is counted apart.",
            "",
            f"The images: {', '.join(names)}.",
            "",
            "| set | packages added | MB | which | images |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "`python scripts/make_colab_page.py` writes this page, and a test compares it with the lock.",
            "",
        ]
    )


def _row(which: str, added: str, images: list[tuple[str, int]], names: list[str]) -> str:
    sizes = sorted({megabytes for _name, megabytes in images})
    size = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    count = 0 if added == "nothing" else len(added.split(", "))
    where = "all" if len(images) == len(names) else ", ".join(name for name, _megabytes in images)
    return f"| `{which}` | {count} | {size} | {added} | {where} |"


def write() -> list[Path]:
    """Write the page; returns it where it changed."""
    text = colab_page()
    if PAGE.read_text(encoding="utf-8") == text:
        return []
    PAGE.write_text(text, encoding="utf-8")
    return [PAGE]


if __name__ == "__main__":
    print("\n".join(str(path) for path in write()) or "Nothing changed.")
