"""PDF files are drawn by a child: hostile ones end with a sentence, take no more than their limits, and stop nobody."""

import contextlib
import json
import os
import sys
import time
import zlib
from pathlib import Path

import pytest

pytest.importorskip("pypdfium2")
Image = pytest.importorskip("PIL.Image")

from fastsd_helpers.errors import DependencyMissing  # noqa: E402
from fastsd_helpers.trocr.pages import pdf as pages_of_pdf  # noqa: E402
from fastsd_helpers.trocr.pages.inputs import gather  # noqa: E402

LINE = b"0 0 m 99 99 l S"


def pdf(objects: list[bytes]) -> bytes:
    out, places = bytearray(b"%PDF-1.7\n"), []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer\n<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, start)
    return bytes(out)


def stream(data: bytes, more: bytes = b"") -> bytes:
    return b"<<%s/Length %d>>stream\n" % (more, len(data)) + data + b"\nendstream"


def document(*boxes: tuple[int, int], content: bytes = stream(LINE), resources: bytes = b"", more: tuple = ()) -> bytes:
    """A page for every box, in points; all of them show object 3."""
    first = 4 + len(more)
    kids = b" ".join(b"%d 0 R" % (first + place) for place in range(len(boxes)))
    pages = [
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 %d %d]/Contents 3 0 R/Resources<<%s>>>>" % (*box, resources)
        for box in boxes
    ]
    tree = b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, len(boxes))
    return pdf([b"<</Type/Catalog/Pages 2 0 R>>", tree, content, *more, *pages])


def endless() -> bytes:
    """A form that shows another one twenty times, twelve deep."""
    depth = 12
    forms = []
    for place in range(depth):
        last = place == depth - 1
        below = b"" if last else b"/Resources<</XObject<</F %d 0 R>>>>" % (5 + place)
        kind = b"/Type/XObject/Subtype/Form/BBox[0 0 200 200]" + below
        forms.append(stream(LINE if last else b"/F Do " * 20, kind))
    return document((200, 200), content=stream(b"/F Do"), resources=b"/XObject<</F 4 0 R>>", more=tuple(forms))


def bomb() -> bytes:
    """A gigabyte of blanks, packed twice into a few thousand bytes."""
    once = zlib.compressobj(9)
    packed = b"".join(once.compress(b" " * 2**24) for _ in range(64)) + once.flush()
    return document((200, 200), content=stream(zlib.compress(packed, 9), b"/Filter[/FlateDecode/FlateDecode]"))


def drawn(path: Path) -> list[tuple[str, object]]:
    return [(page.name, page.drawn) for page in pages_of_pdf.draw_pages(path, path.name)]


def test_a_page_is_drawn_pixel_by_pixel_as_without_a_child(tmp_path: Path) -> None:
    import pypdfium2

    path = tmp_path / "scan.pdf"
    path.write_bytes(document((203, 101), (595, 842)))
    with contextlib.closing(pypdfium2.PdfDocument(path)) as opened:
        expected = [opened[place].render(scale=300 / 72).to_pil().convert("RGB") for place in range(2)]
    got = drawn(path)
    assert [name for name, _ in got] == ["scan.pdf, page 1", "scan.pdf, page 2"]
    for (_, picture), known in zip(got, expected, strict=True):
        assert picture.mode == "RGB"
        assert picture.size == known.size
        assert picture.tobytes() == known.tobytes()


def test_huge_pages_are_drawn_coarser_or_refused_and_the_next_ones_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(document((720_000, 720_000), (99, 99), (2000, 1000), (1, 700_000)))
    monkeypatch.setattr(pages_of_pdf, "_MOST_PIXELS", 8_000_000)
    huge, small, wide, thin = (picture for _, picture in drawn(path))
    assert huge == "a.pdf, page 1 measures 10,000 x 10,000 inches: too large to draw. Save it at its true size."
    assert small.size == (413, 413)
    assert 7_900_000 < wide.width * wide.height <= 8_100_000
    assert abs(wide.width / wide.height - 2) < 0.01
    assert isinstance(thin, str) or thin.width * thin.height <= 16_000_000


def test_an_endless_page_ends_and_the_ones_after_it_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_of_pdf, "_PAGE_S", 1)
    monkeypatch.setattr(pages_of_pdf, "_MOST_FAILURES", 2)
    (tmp_path / "a.pdf").write_bytes(endless())
    (tmp_path / "b.png").write_bytes(b"")
    Image.linear_gradient("L").save(tmp_path / "c.png")
    first, second, third = gather(tmp_path)
    assert first.problem == "a.pdf, page 1 cannot be drawn: it takes longer than 1 s."
    assert "0 bytes" in second.problem
    assert third.picture is not None


def test_a_document_whose_every_page_is_endless_is_left_out_after_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages_of_pdf, "_PAGE_S", 0)
    monkeypatch.setattr(pages_of_pdf, "_MOST_FAILURES", 2)
    one = endless().replace(b"/Kids[16 0 R]/Count 1>>", b"/Kids[" + b"16 0 R " * 50 + b"]/Count 50>>")
    assert b"Count 50" in one
    (tmp_path / "a.pdf").write_bytes(one)
    got = drawn(tmp_path / "a.pdf")
    assert len(got) == 3
    assert got[-1][1] == "a.pdf is left out from page 3 on: 2 of its pages cannot be drawn."


def test_a_bomb_takes_the_childs_memory_and_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(pages_of_pdf, "_MEMORY_BYTES", 2**29)
    path = tmp_path / "bomb.pdf"
    path.write_bytes(bomb())
    assert path.stat().st_size < 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ((_, problem),) = drawn(path)
    assert problem.startswith("bomb.pdf, page 1 cannot be drawn: ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty."),
        (b"%PDF-1.7", "is damaged"),
        (b"no document at all" * 99, "it is a text file, no PDF."),
        (document((99, 99))[:150], "is damaged"),
        (pdf([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[2 0 R]/Count 1000000000>>"]), "damaged|no pages"),
        (pdf([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[]/Count 0>>"]), "damaged|no pages"),
    ],
    ids=["empty", "only its mark", "something else", "cut", "a tree that holds itself", "no pages"],
)
def test_a_broken_document_ends_with_one_sentence(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(data)
    ((name, problem),) = drawn(path)
    assert name == "a.pdf"
    assert any(word in problem for word in words.split("|")), problem
    assert "\n" not in problem


def test_pages_beyond_the_most_are_named_and_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_of_pdf, "_MOST_PAGES", 3)
    path = tmp_path / "a.pdf"
    path.write_bytes(document(*[(20, 20)] * 5))
    got = drawn(path)
    assert len(got) == 4
    assert got[-1] == ("a.pdf", "a.pdf has 5 pages: those after 3 are not read; split it.")


def test_pages_are_drawn_while_they_are_read_and_a_reader_that_stops_ends_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []
    real = pages_of_pdf.Child
    monkeypatch.setattr(
        pages_of_pdf, "Child", lambda *words, **more: children.append(real(*words, **more)) or children[-1]
    )
    path = tmp_path / "book.pdf"
    path.write_bytes(document(*[(595, 842)] * 500))
    pages = pages_of_pdf.draw_pages(path, "book.pdf")
    next(pages)
    time.sleep(1)  # it could draw many in this time, and waits instead
    spent = sum(_cpu_s(int(pid)) for pid in os.listdir("/proc") if pid.isdigit() and _group(pid) == children[0].pid)
    assert spent < 20  # all 500 take minutes
    next(pages)
    assert children[0].alive()
    pages.close()
    assert not children[0].alive()
    assert len(children) == 1


def _group(pid: str) -> int:
    try:
        return os.getpgid(int(pid))
    except ProcessLookupError:
        return -1


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_child_gets_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    real = pages_of_pdf.Child

    def child(*words: object, **more: object) -> object:
        given.update(more["env"])
        return real(*words, **more)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(pages_of_pdf, "Child", child)
    path = tmp_path / "a.pdf"
    path.write_bytes(document((99, 99)))
    assert len(drawn(path)) == 1
    assert set(given) <= {"PATH", "LD_LIBRARY_PATH"}


def test_what_the_child_says_is_believed_only_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that takes the child over could answer anything; memory here stays bounded all the same."""
    path = tmp_path / "a.pdf"
    path.write_bytes(document((99, 99)))
    program = tmp_path / "child.py"
    for said in (
        {"page": 0, "size": [10**9, 10**9], "stride": 3 * 10**9, "mode": "BGR"},
        {"page": 0, "size": [10, 10], "stride": 10**12, "mode": "BGR"},
        {"page": 0, "size": [-4, -4], "stride": -12, "mode": "BGR"},
        {"page": 0, "size": [4, 0], "stride": 12, "mode": "BGR"},
        {"page": 0, "size": "large", "stride": 12, "mode": "BGR"},
        {"page": 0, "size": [4, 4], "stride": 12, "mode": "anything"},
        {"page": 0},
    ):
        words = [json.dumps({"pages": 1}), json.dumps(said)]
        program.write_text(f"for line in {words!r}: print(line, flush=True)")
        monkeypatch.setattr(pages_of_pdf.pdf_child, "__file__", str(program))
        assert drawn(path)[0] == ("a.pdf, page 1", "a.pdf, page 1 cannot be drawn: it is damaged.")
    program.write_text("while True: print('x' * 4096, end='')")
    assert drawn(path) == [("a.pdf", "a.pdf cannot be opened: it is damaged.")]


def test_without_pypdfium2_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(DependencyMissing, match=r"Reading the PDF a.pdf needs the package pypdfium2"):
        drawn(tmp_path / "a.pdf")
