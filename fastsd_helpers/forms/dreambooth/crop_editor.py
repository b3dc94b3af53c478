"""The crop editor: move a square on a photo by mouse, keys or numbers; then prepare the photos again with these boxes.

The image is HTML whose own handlers move the square and write its place into a hidden text field, which is how it
reaches Python in JupyterLab and Colab alike. Where a page does not run them, the numbers do the same. What was moved
and is not used yet is held in the session.
"""

import base64
import html
import io
import uuid
from collections.abc import Callable
from typing import Any

from fastsd_helpers.dreambooth.dataset.crops import (
    Crop,
    keeps_shapes,
    list_crops,
    open_original,
    prepare_with_boxes,
)
from fastsd_helpers.errors import DatasetError, FastSDError
from fastsd_helpers.forms.widgets.view import View, draw_script, load_widgets, make_button, make_field, make_frame
from fastsd_helpers.sessions import Session

__all__ = ["CropEditor", "edit_crops"]

_WIDEST_PX = 480
_SMALLEST_SIDE_PX = 32
_WHOLE = (
    "These images keep their whole photos (crop none), so there is no crop to correct. For square crops choose crop "
    "smart in cell 3a, and run cell 3b again."
)
_HELP = "Drag the square, or its corner. With keys: arrows move it, plus and minus (or Shift and arrows) resize it."

# Handlers as attributes, because a script that is put into a page this way is not run. `e` is the pointer's event,
# `d` the drag that is going on. Places are kept in per cent of the image, which a narrow cell shows smaller.
_PLACE = """
this.place=this.place||((l,t,s)=>{const b=this.querySelector('.fastsd-box'),W=this.clientWidth,H=this.clientHeight;
s=Math.max(12,Math.min(s,W,H));l=Math.max(0,Math.min(l,W-s));t=Math.max(0,Math.min(t,H-s));
b.style.left=100*l/W+'%';b.style.top=100*t/H+'%';b.style.width=100*s/W+'%';});
this.tell=this.tell||(()=>{const b=this.querySelector('.fastsd-box'),k=this.dataset.width/this.clientWidth;
const i=document.querySelector('.'+this.dataset.field+' input');if(!i)return;
i.value=[b.offsetLeft*k,b.offsetTop*k,b.offsetWidth*k].map(v=>Math.round(v)).join(',');
i.dispatchEvent(new Event('input',{bubbles:true}));i.dispatchEvent(new Event('change',{bubbles:true}));});
"""
_DOWN = (
    _PLACE
    + """
const b=this.querySelector('.fastsd-box'),e=event;
this.setPointerCapture(e.pointerId);e.preventDefault();b.focus();
this.drag={x:e.clientX,y:e.clientY,l:b.offsetLeft,t:b.offsetTop,s:b.offsetWidth,
size:!!e.target.closest('.fastsd-corner')};
"""
)
_MOVE = """
const d=this.drag;if(!d)return;const e=event,dx=e.clientX-d.x,dy=e.clientY-d.y;
if(d.size)this.place(d.l,d.t,Math.min(d.s+Math.max(dx,dy),this.clientWidth-d.l,this.clientHeight-d.t));
else this.place(d.l+dx,d.t+dy,d.s);
"""
_UP = "if(!this.drag)return;this.drag=null;this.tell();"
_KEY = (
    _PLACE
    + """
const e=event,b=this.querySelector('.fastsd-box'),n=Math.max(1,this.clientWidth/(e.altKey?400:80));
let l=b.offsetLeft,t=b.offsetTop,s=b.offsetWidth;
const grow={'+':1,'=':1,'-':-1,'_':-1}[e.key]||(e.shiftKey?{ArrowRight:1,ArrowDown:1,ArrowLeft:-1,ArrowUp:-1}[e.key]:0);
const go={ArrowLeft:[-1,0],ArrowRight:[1,0],ArrowUp:[0,-1],ArrowDown:[0,1]}[e.key];
if(grow)this.place(l-grow*n/2,t-grow*n/2,s+grow*n);else if(go&&!e.ctrlKey&&!e.metaKey)this.place(l+go[0]*n,t+go[1]*n,s);
else return;
e.preventDefault();e.stopPropagation();clearTimeout(this.soon);this.soon=setTimeout(this.tell,350);
"""
)
# Before JupyterLab's own handlers, for which an arrow key is the next cell.
_CAPTURE = """
const frame=this.closest('.fastsd');if(!frame||frame.cropping)return;frame.cropping=true;
frame.addEventListener('keydown',event=>{const crop=event.target.closest('.fastsd-crop');
if(crop&&crop.onkeydown){crop.onkeydown(event);}},true);
"""


def edit_crops(session: Session) -> "CropEditor":
    """Show the crop editor for a session's prepared images; the last line of a cell displays it.

    Args:
        session: the session, as `open_session` gives it.

    Returns:
        The view; as a cell's last line it is displayed.
    """
    return CropEditor(session)


class CropEditor(View):
    """Widgets that show one photo at a time with its square.

    Attributes:
        boxes: photo's name -> (left, top, right, bottom) in its pixels, of every box chosen by hand.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.boxes: dict[str, tuple[int, int, int, int]] = {}
        self._quiet = False
        self._photo: Any = None
        self._name = ""
        self._make_widgets()
        self._load()

    def _make_widgets(self) -> None:
        widgets = load_widgets()
        layout = widgets.Layout
        self._field = f"fastsd-crop-{uuid.uuid4().hex[:8]}"
        self._choice = widgets.Dropdown(description="photo")
        self._picture = widgets.HTML()
        self._hidden = widgets.Text(continuous_update=False, description="box", layout=layout(display="none"))
        self._hidden.add_class(self._field)
        self._sliders = {
            name: widgets.BoundedIntText(min=0, max=1, description=words, continuous_update=False)
            for name, words in (("left", "left edge, px"), ("top", "top edge, px"), ("side", "side, px"))
        }
        self._automatic = make_button("Automatic again", icon="undo")
        self._apply = make_button("Use these crops", icon="check", kind="primary", name="fastsd-apply-crops")
        self._message = widgets.HTML()
        self._choice.observe(lambda _change: self._guard(self._show_chosen), names="value")
        self._hidden.observe(lambda change: self._guard(lambda: self._take_drag(change["new"])), names="value")
        for slider in self._sliders.values():
            slider.observe(lambda _change: self._guard(self._take_sliders), names="value")
        self._automatic.on_click(lambda _button: self._guard(self._forget))
        self._apply.on_click(lambda _button: self._guard(self._use))
        about = widgets.HTML(html.escape(_HELP))
        about.add_class("fastsd-quiet")
        fields = [make_field(self._choice), *(make_field(slider) for slider in self._sliders.values())]
        self._controls = widgets.VBox([*fields, about, widgets.HBox([self._automatic, self._apply])])
        right = widgets.VBox([self._controls, self._message], layout=layout(flex="1 1 300px"))
        keys = widgets.HTML(draw_script(_CAPTURE), layout=layout(display="none"))
        row = widgets.HBox([self._picture, right, self._hidden], layout=layout(align_items="flex-start"))
        self.box = make_frame(keys, row, label="The crops of the photos")

    def _guard(self, work: Callable[[], None]) -> None:
        if self._quiet:
            return
        try:
            work()
        except FastSDError as err:
            self._say_error(err)

    def _load(self) -> None:
        """Read the session's crops anew; a session without photos shows the sentence that says so."""
        try:
            # A held-out photo may have the name of a training one; a box goes by the name, and the first one shows it.
            self._crops = {crop.source: crop for crop in reversed(list_crops(self._session))}
            self._crops = dict(reversed(self._crops.items()))
        except DatasetError as err:
            self._crops = {}
            self._say(_WHOLE) if keeps_shapes(self._session) else self._say_error(err)
        self._controls.layout.display = "" if self._crops else "none"
        self.boxes = {name: crop.box for name, crop in self._crops.items() if crop.by_hand}
        self._draft = self._read_draft()
        for name, box in self._draft.items():
            if box is None:
                self.boxes.pop(name, None)
            else:
                self.boxes[name] = box
        self._fill_choice(None)
        self._guard(self._show_chosen)

    def _fill_choice(self, chosen: str | None) -> None:
        self._quiet = True
        entries = [(f"{'✎ ' if name in self.boxes else ''}{name}", name) for name in self._crops]
        self._choice.options = entries
        self._choice.value = chosen or (entries[0][1] if entries else None)
        self._quiet = False

    def _crop(self) -> Crop | None:
        return self._crops.get(self._choice.value)

    def _show_chosen(self) -> None:
        crop = self._crop()
        for widget in (*self._sliders.values(), self._automatic, self._apply):
            widget.disabled = crop is None
        if crop is None:
            return
        self._photo = None
        self._picture.value = ""
        self._photo = open_original(self._session, crop)
        self._name = crop.source
        waiting = ", ".join(self._draft)
        self._say(
            f"Moved, but not applied yet: {waiting}. Press 'Use these crops'."
            if waiting
            else "Marked photos (✎) have a crop of your own."
        )
        self._show_box(self.boxes.get(crop.source, crop.box))

    def _read_draft(self) -> dict[str, "tuple[int, int, int, int] | None"]:
        """Boxes that were moved and are not used yet (None: given up), of an earlier run of the cell too."""
        held = self._session.record.get("crop_draft") or {}
        draft: dict[str, tuple[int, int, int, int] | None] = {}
        for name, box in held.items() if isinstance(held, dict) else ():
            whole = isinstance(box, list) and len(box) == 4 and all(isinstance(part, int) for part in box)
            if name in self._crops and (whole or box is None):
                draft[name] = tuple(box) if whole else None
        return draft

    def _hold(self, name: str, box: "tuple[int, int, int, int] | None") -> None:
        self._draft[name] = box
        held = {key: list(value) if value else None for key, value in self._draft.items()}
        self._session.save_if_possible(crop_draft=held)

    def _show_box(self, box: tuple[int, int, int, int], *, draw: bool = True) -> None:
        width, height = self._photo.size
        left, top, side = box[0], box[1], min(box[2] - box[0], box[3] - box[1])
        self._quiet = True
        smallest = min(_SMALLEST_SIDE_PX, width, height)
        for name, low, high, value in (
            ("side", smallest, min(width, height), side),
            ("left", 0, width - side, left),
            ("top", 0, height - side, top),
        ):
            slider = self._sliders[name]
            # In this order, because a slider refuses a value beyond the limits it has at the moment.
            slider.min, slider.max = min(slider.min, low), max(slider.max, high, low)
            slider.value = min(max(value, low), high)
            slider.min, slider.max = low, max(high, low)
        self._quiet = False
        if draw:
            self._picture.value = self._draw(left, top, side)

    def _draw(self, left: int, top: int, side: int) -> str:
        small = self._photo.copy()
        small.thumbnail((_WIDEST_PX, _WIDEST_PX))
        data = io.BytesIO()
        small.save(data, "JPEG", quality=85)
        source = base64.b64encode(data.getvalue()).decode()
        width, height = self._photo.size
        handlers = " ".join(
            f'{name}="{html.escape(" ".join(code.split()), quote=True)}"'
            for name, code in (
                ("onpointerdown", _DOWN),
                ("onpointermove", _MOVE),
                ("onpointerup", _UP),
                ("onkeydown", _KEY),
            )
        )
        name = html.escape(self._name, quote=True)
        return (
            f'<div class="fastsd-crop" data-width="{width}" data-field="{self._field}" {handlers} '
            f'style="position:relative;width:{small.width}px;max-width:100%;aspect-ratio:{width}/{height};'
            'overflow:hidden;touch-action:none;user-select:none;line-height:0;margin:3px 12px 8px 3px">'
            f'<img src="data:image/jpeg;base64,{source}" alt="{name}, the full photo" draggable="false" '
            'style="display:block;width:100%;height:100%;margin:0">'
            f'<div class="fastsd-box" tabindex="0" role="application" aria-label="Crop of {name}. {_HELP}" '
            f'style="position:absolute;box-sizing:border-box;left:{100 * left / width:.4f}%;'
            f"top:{100 * top / height:.4f}%;width:{100 * side / width:.4f}%;aspect-ratio:1;"
            "border:2px solid #00a39b;outline:1px solid white;cursor:move;"
            'box-shadow:0 0 0 2000px rgba(255,255,255,.55)">'
            '<div class="fastsd-corner" style="position:absolute;right:-2px;bottom:-2px;width:16px;height:16px;'
            'background:#00a39b;border:1px solid white;cursor:nwse-resize"></div></div></div>'
        )

    def _take_drag(self, text: str) -> None:
        try:
            left, top, side = (int(part) for part in text.split(","))
        except ValueError:
            return
        self._set_box(left, top, side, draw=False)

    def _take_sliders(self) -> None:
        self._set_box(*(self._sliders[name].value for name in ("left", "top", "side")))

    def _set_box(self, left: int, top: int, side: int, *, draw: bool = True) -> None:
        crop = self._crop()
        if crop is None or self._photo is None:
            return
        width, height = self._photo.size
        side = max(1, min(side, width, height))
        left, top = min(max(left, 0), width - side), min(max(top, 0), height - side)
        box = (left, top, left + side, top + side)
        if box == self.boxes.get(crop.source, crop.box):
            return
        self.boxes[crop.source] = box
        self._hold(crop.source, box)
        self._fill_choice(crop.source)
        # The page has moved the square itself; drawn anew it would lose the keyboard.
        self._show_box(box, draw=draw)
        self._say(f"{crop.source}: {side} x {side} px at {left}, {top}. Not applied yet: press 'Use these crops'.")

    def _forget(self) -> None:
        crop = self._crop()
        if crop is None:
            return
        self.boxes.pop(crop.source, None)
        self._hold(crop.source, None)
        self._fill_choice(crop.source)
        if crop.by_hand:
            self._say(f"{crop.source} is cropped automatically again once you press 'Use these crops'.")
        else:
            self._show_box(crop.box)

    def _use(self) -> None:
        chosen = self._choice.value
        self._say("Preparing the images again…")
        result = prepare_with_boxes(self._session, self.boxes)
        self._session.save_if_possible(crop_draft={})
        self._load()
        if chosen in self._crops:
            self._fill_choice(chosen)
            self._show_chosen()
        by_hand = sum(crop.by_hand for crop in self._crops.values())
        self._say(f"{result.train} images are prepared, {by_hand} with a crop of your own.")
