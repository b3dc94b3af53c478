"""The crop editor: drag a square on a photo, or move three sliders; then prepare the photos again with these boxes.

The picture is HTML whose own handlers move the square and write its place into a hidden text field, which is how it
reaches Python in JupyterLab and Colab alike. Where a page does not run them, the sliders do the same.
"""

import base64
import html
import io
import uuid
from collections.abc import Callable
from typing import Any

from fastsd_helpers.dreambooth.crops import Crop, list_crops, open_original, prepare_with_boxes
from fastsd_helpers.errors import DatasetError, FastSDError
from fastsd_helpers.forms.view import View, load_widgets
from fastsd_helpers.sessions import Session

__all__ = ["CropEditor", "edit_crops"]

_WIDEST_PX = 480
_SMALLEST_SIDE_PX = 32

# Handlers as attributes, because a script that is put into a page this way is not run. `e` is the pointer's event,
# `d` the drag that is going on, all lengths in pixels of the shown picture.
_DOWN = """
const r=this.getBoundingClientRect(),b=this.querySelector('.fastsd-box'),e=event;
this.setPointerCapture(e.pointerId);e.preventDefault();
this.drag={x:e.clientX,y:e.clientY,l:b.offsetLeft,t:b.offsetTop,s:b.offsetWidth,
size:!!e.target.closest('.fastsd-corner')};
"""
_MOVE = """
const d=this.drag;if(!d)return;const b=this.querySelector('.fastsd-box'),e=event;
const W=this.clientWidth,H=this.clientHeight,dx=e.clientX-d.x,dy=e.clientY-d.y;
const clamp=(v,a,z)=>Math.max(a,Math.min(v,z));
if(d.size){const s=clamp(d.s+Math.max(dx,dy),12,Math.min(W-d.l,H-d.t));
b.style.width=b.style.height=s+'px';}
else{b.style.left=clamp(d.l+dx,0,W-d.s)+'px';b.style.top=clamp(d.t+dy,0,H-d.s)+'px';}
"""
_UP = """
if(!this.drag)return;this.drag=null;const b=this.querySelector('.fastsd-box'),k=this.dataset.scale;
const i=document.querySelector('.'+this.dataset.field+' input');if(!i)return;
i.value=[b.offsetLeft*k,b.offsetTop*k,b.offsetWidth*k].map(v=>Math.round(v)).join(',');
i.dispatchEvent(new Event('input',{bubbles:true}));i.dispatchEvent(new Event('change',{bubbles:true}));
"""


def edit_crops(session: Session) -> "CropEditor":
    """Show the crop editor for a session's prepared pictures; the last line of a cell displays it."""
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
        self._scale = 1.0
        self._make_widgets()
        self._load()

    def _make_widgets(self) -> None:
        widgets = load_widgets()
        layout = widgets.Layout
        self._field = f"fastsd-crop-{uuid.uuid4().hex[:8]}"
        self._choice = widgets.Select(layout=layout(width="250px", height="300px"))
        self._picture = widgets.HTML()
        self._hidden = widgets.Text(continuous_update=False, layout=layout(display="none"))
        self._hidden.add_class(self._field)
        self._sliders = {
            name: widgets.IntSlider(
                min=0, max=1, description=name, continuous_update=False, layout=layout(width="380px")
            )
            for name in ("left", "top", "side")
        }
        self._automatic = widgets.Button(description="Automatic again", icon="undo", layout=layout(width="160px"))
        self._apply = widgets.Button(
            description="Use these crops", icon="check", button_style="primary", layout=layout(width="160px")
        )
        self._apply.add_class("fastsd-apply-crops")
        self._message = widgets.HTML()
        self._choice.observe(lambda _change: self._guard(self._show_chosen), names="value")
        self._hidden.observe(lambda change: self._guard(lambda: self._take_drag(change["new"])), names="value")
        for slider in self._sliders.values():
            slider.observe(lambda _change: self._guard(self._take_sliders), names="value")
        self._automatic.on_click(lambda _button: self._guard(self._forget))
        self._apply.on_click(lambda _button: self._guard(self._use))
        buttons = widgets.HBox([self._automatic, self._apply])
        right = widgets.VBox([self._picture, *self._sliders.values(), buttons, self._message, self._hidden])
        self.box = widgets.HBox([self._choice, right], layout=layout(align_items="flex-start"))

    def _guard(self, work: Callable[[], None]) -> None:
        if self._quiet:
            return
        try:
            work()
        except FastSDError as err:
            self._say(f"✋ {err.problem} {err.hint}")

    def _load(self) -> None:
        """Read the session's crops anew; a session without photos shows the sentence that says so."""
        try:
            # A held-out photo may have the name of a training one; a box goes by the name, and the first one shows it.
            self._crops = {crop.source: crop for crop in reversed(list_crops(self._session))}
            self._crops = dict(reversed(self._crops.items()))
        except DatasetError as err:
            self._crops = {}
            self._say(f"✋ {err.problem} {err.hint}")
        self.boxes = {name: crop.box for name, crop in self._crops.items() if crop.by_hand}
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
        self._say("Drag the square, or its corner. Marked photos (✎) have a box of yours.")
        self._show_box(self.boxes.get(crop.source, crop.box))

    def _show_box(self, box: tuple[int, int, int, int]) -> None:
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
        self._picture.value = self._draw(left, top, side)

    def _draw(self, left: int, top: int, side: int) -> str:
        small = self._photo.copy()
        small.thumbnail((_WIDEST_PX, _WIDEST_PX))
        scale = self._photo.width / small.width
        data = io.BytesIO()
        small.save(data, "JPEG", quality=85)
        source = base64.b64encode(data.getvalue()).decode()
        x, y, s = left / scale, top / scale, side / scale
        handlers = " ".join(
            f'{name}="{html.escape(" ".join(code.split()), quote=True)}"'
            for name, code in (("onpointerdown", _DOWN), ("onpointermove", _MOVE), ("onpointerup", _UP))
        )
        return (
            f'<div class="fastsd-crop" data-scale="{scale!r}" data-field="{self._field}" {handlers} '
            f'style="position:relative;width:{small.width}px;height:{small.height}px;overflow:hidden;'
            'touch-action:none;user-select:none;line-height:0">'
            f'<img src="data:image/jpeg;base64,{source}" width="{small.width}" height="{small.height}" '
            'draggable="false" style="display:block;max-width:none;margin:0">'
            f'<div class="fastsd-box" style="position:absolute;box-sizing:border-box;left:{x:.2f}px;top:{y:.2f}px;'
            f"width:{s:.2f}px;height:{s:.2f}px;border:2px solid #00a39b;outline:1px solid white;cursor:move;"
            'box-shadow:0 0 0 2000px rgba(255,255,255,.55)">'
            '<div class="fastsd-corner" style="position:absolute;right:-2px;bottom:-2px;width:16px;height:16px;'
            'background:#00a39b;border:1px solid white;cursor:nwse-resize"></div></div></div>'
        )

    def _take_drag(self, text: str) -> None:
        try:
            left, top, side = (int(part) for part in text.split(","))
        except ValueError:
            return
        self._set_box(left, top, side)

    def _take_sliders(self) -> None:
        self._set_box(*(self._sliders[name].value for name in ("left", "top", "side")))

    def _set_box(self, left: int, top: int, side: int) -> None:
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
        self._fill_choice(crop.source)
        self._show_box(box)
        self._say(f"{crop.source}: {side} x {side} px at {left}, {top}. Not used yet: press 'Use these crops'.")

    def _forget(self) -> None:
        crop = self._crop()
        if crop is None:
            return
        self.boxes.pop(crop.source, None)
        self._fill_choice(crop.source)
        if crop.by_hand:
            self._say(f"{crop.source} is cropped automatically again once you press 'Use these crops'.")
        else:
            self._show_box(crop.box)

    def _use(self) -> None:
        chosen = self._choice.value
        self._say("Preparing the pictures again…")
        result = prepare_with_boxes(self._session, self.boxes)
        self._load()
        if chosen in self._crops:
            self._fill_choice(chosen)
            self._show_chosen()
        by_hand = sum(crop.by_hand for crop in self._crops.values())
        self._say(f"{result.train} pictures are prepared, {by_hand} with a box of yours.")
