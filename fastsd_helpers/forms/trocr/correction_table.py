"""The correction table: each line's image and name beside a field with its text; what is right is kept at once."""

import html
from typing import Any

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.trocr.reading_view import draw_doubt, picture_tag
from fastsd_helpers.forms.widgets.view import View, draw_error, draw_script, load_widgets, make_button, make_frame
from fastsd_helpers.trocr.reading.session import ReadingSession, SavedLine

__all__ = ["CorrectionTable", "correct_lines"]

_ON_A_PAGE = 10
_SHOWN_LETTERS = 60
_WHICH = (
    ("all, in page order", "all"),
    ("lowest confidence first", "doubt"),
    ("not reviewed yet", "open"),
)
# In the page, since a notebook's text field knows no keys that go to another field; over the end of a page of the table
# too. Tab passes the buttons beside a field, for these keys do what they do. The notebook's own shortcuts are kept
# away: Shift+Enter would run the cell and draw the table anew.
_CODE = """
(function(el){let tries=0;const begin=setInterval(()=>{
const root=el.closest('.fastsd-corrections');
if(!root){if(++tries>200)clearInterval(begin);return;}
clearInterval(begin);if(root.dataset.keys)return;root.dataset.keys='1';
root.setAttribute('data-lm-suppress-shortcuts','true');root.setAttribute('data-p-suppress-shortcuts','true');
const fields=()=>[...root.querySelectorAll('.fastsd-line input')];
const go=(field)=>{field.focus();field.select();};
const skip=()=>root.querySelectorAll('button.fastsd-skip').forEach((b)=>{b.tabIndex=-1;});
const turn=(name,place)=>{const button=root.querySelector('button.'+name);if(!button||button.disabled)return;
const old=fields()[0];button.click();let n=0;const wait=setInterval(()=>{const all=fields();
if(all.length&&all[0]!==old){clearInterval(wait);skip();go(all.at(place));}else if(++n>200)clearInterval(wait);},50);};
skip();root.addEventListener('focusin',skip);
root.addEventListener('keydown',(e)=>{
const row=e.target.closest('.fastsd-line-row');
if(!row||e.target.tagName!=='INPUT'||e.isComposing)return;
const press=(name)=>{const button=row.querySelector('button.'+name);if(button)button.click();};
const plain=!e.ctrlKey&&!e.altKey&&!e.metaKey;
if(e.key==='Escape'&&plain){e.preventDefault();e.stopPropagation();press('fastsd-undo');return;}
if(e.key!=='Enter'||!plain)return;
e.preventDefault();e.stopPropagation();
const all=fields(),at=all.indexOf(e.target);
e.target.dispatchEvent(new Event('change',{bubbles:true}));
if(e.shiftKey){if(at>0)go(all[at-1]);else turn('fastsd-back',-1);return;}
press('fastsd-right');
if(at<all.length-1)go(all[at+1]);else turn('fastsd-next',0);
},true);
},50);})(this)
"""
_KEYS = "Enter: accept, next line. Shift+Enter: previous line. Escape: undo. Marked words have low confidence."


def correct_lines(session: ReadingSession) -> "CorrectionTable":
    """Show the lines of a session for correction; a cell's last line displays it.

    Drawn again, in a new kernel too, it shows the lines it showed last.

    Args:
        session: the session, as `open_reading` gives it.

    Returns:
        The view; as a cell's last line it is displayed.
    """
    return CorrectionTable(session)


class CorrectionTable(View):
    """Ten lines at a time: image, name, field, the words that were doubted, "right as it stands" and its undo.

    A changed field is kept when it is left or Enter is pressed; Enter marks a line that was not changed as right too.
    Lines marked right are learned from.

    Attributes:
        box: the widgets.
    """

    def __init__(self, session: ReadingSession) -> None:
        self._session, self._first = session, 0
        self._shown: list[SavedLine] = []
        self._fields: dict[str, Any] = {}  # of the lines that are shown, by their key
        widgets = load_widgets()
        known = dict(session.record.get("correcting") or {})
        which = known.get("which") if known.get("which") in [value for _name, value in _WHICH] else "all"
        self._which = widgets.Dropdown(
            options=list(_WHICH),
            value=which,
            description="show",
            style={"description_width": "initial"},
            layout=widgets.Layout(width="230px"),
        )
        self._back = make_button("Back", icon="arrow-left", about="Previous lines", name="fastsd-back")
        self._next = make_button("Next", icon="arrow-right", about="Next lines", name="fastsd-next")
        self._rest = make_button("Accept all shown", icon="check", name="fastsd-all-right")
        self._message = widgets.HTML()
        self._rows = widgets.VBox([])
        self._which.observe(lambda _change: self._go(0), names="value")
        self._back.on_click(lambda _button: self._go(self._first - _ON_A_PAGE))
        self._next.on_click(lambda _button: self._go(self._first + self._step()))
        self._rest.on_click(lambda _button: self._all_right())
        bar = widgets.HBox([self._which, self._back, self._next, self._rest])
        keys = widgets.HTML(f"<span style='opacity:.85'>{html.escape(_KEYS)}</span>{draw_script(_CODE)}")
        self.box = make_frame(bar, keys, self._message, self._rows)
        self.box.add_class("fastsd-corrections")
        self._go(int(known.get("first", 0)))

    def _step(self) -> int:
        """How far the next lines are: those that are done are among the ones not looked at no longer."""
        if self._which.value != "open":
            return _ON_A_PAGE
        looked_at = {line.key for line in self._session.lines() if line.right is not None}
        return sum(line.key not in looked_at for line in self._shown)

    def _go(self, first: int) -> None:
        every = [line for line in self._session.lines() if not line.read.problem]
        places = {line.key: place for place, line in enumerate(every, 1)}
        lines = every
        if self._which.value == "doubt":
            lines = sorted(every, key=lambda line: line.read.confidence)
        elif self._which.value == "open":
            lines = [line for line in every if line.right is None]
        self._first = max(0, min(first, len(lines) - 1))
        self._shown = lines[self._first : self._first + _ON_A_PAGE]
        self._back.disabled = self._first == 0
        self._next.disabled = self._first + _ON_A_PAGE >= len(lines)
        self._rest.disabled = not self._shown
        self._fields = {}
        self._rows.children = tuple(self._row(line, places[line.key]) for line in self._shown)
        self._session.save_if_possible(correcting={"which": self._which.value, "first": self._first})
        self._tell()

    def _row(self, line: SavedLine, place: int) -> Any:
        widgets = load_widgets()
        layout = widgets.Layout
        name = line.read.name or line.source
        field = widgets.Text(
            value=line.text,
            description=f"line {place}",
            continuous_update=False,
            style={"description_width": "62px"},
            layout=layout(width="100%"),
        )
        field.add_class("fastsd-line")
        self._fields[line.key] = field
        right = make_button("Right", icon="check", about="Accept as it is (Enter)", name="fastsd-right")
        undo = make_button("Undo", icon="undo", about="Undo the correction (Escape)", name="fastsd-undo")
        for button in (right, undo):
            button.add_class("fastsd-skip")
        state = widgets.HTML(self._state(line))
        field.observe(lambda change: self._correct(line, change["new"], state), names="value")
        right.on_click(lambda _button: self._correct(line, field.value, state))
        undo.on_click(lambda _button: self._correct(line, None, state, field))
        doubted = widgets.HTML(f"<div style='font-size:15px;white-space:pre-wrap'>{draw_doubt(line.read)}</div>")
        picture = widgets.HTML(
            picture_tag(line.picture, f"line {place} of {name}")
            + f"<div style='opacity:.85;overflow-wrap:anywhere'>{html.escape(name)}</div>",
            layout=layout(flex="1 1 300px", min_width="0"),
        )
        below = widgets.HBox([right, undo, state], layout=layout(align_items="center"))
        text = widgets.VBox([field, doubted, below], layout=layout(flex="2 1 380px", min_width="0"))
        row = widgets.HBox([picture, text], layout=layout(margin="0 0 12px 0", align_items="flex-start"))
        row.add_class("fastsd-line-row")
        return row

    @staticmethod
    def _state(line: SavedLine) -> str:
        if line.right is None:
            return f"<span style='opacity:.85'>read, {100 * line.read.confidence:.0f} % confidence</span>"
        if line.right == line.read.text:
            return "✓ accepted"
        read = line.read.text
        shown = read if len(read) <= _SHOWN_LETTERS else f"{read[:_SHOWN_LETTERS]}…"
        return f"<span style='overflow-wrap:anywhere'>✓ corrected; read as <i>{html.escape(shown)}</i></span>"

    def _correct(self, line: SavedLine, text: str | None, state: Any, field: Any = None) -> None:
        """Keep a correction; without a text undo it, for which the field shows again what was read."""
        try:
            if field is not None:
                field.value = line.read.text  # which keeps it as a correction, if it was another text
            self._session.correct(line.key, text)
        except FastSDError as err:
            self._tell(err)
            return
        state.value = self._state(next(now for now in self._session.lines() if now.key == line.key))
        self._tell()

    def _all_right(self) -> None:
        texts = {key: field.value for key, field in self._fields.items()}
        try:
            for key, text in texts.items():
                if text.strip():
                    self._session.correct(key, text)
        except FastSDError as err:
            self._tell(err)
            return
        self._go(self._first)
        empty = sum(not text.strip() for text in texts.values())
        if empty:
            self._tell(FastSDError(f"{empty} of them have no text.", "Type it, or leave them out."))

    def _tell(self, problem: FastSDError | None = None) -> None:
        lines = [line for line in self._session.lines() if not line.read.problem]
        done = sum(line.right is not None for line in lines)
        told = f"{done} of {len(lines)} lines reviewed" if lines else "Nothing has been read yet: run the cells above"
        where = f"; lines {self._first + 1} to {self._first + len(self._shown)} are shown" if self._shown else ""
        bad = draw_error(problem) if problem is not None else ""
        self._message.value = f"<div role='status'><b>{told}</b>{html.escape(where)}.</div>{bad}"
