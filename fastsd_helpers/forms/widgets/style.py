"""How everything below a notebook's cell looks: one stylesheet, for JupyterLab's and Colab's light and dark themes.

Text takes the theme's own colour. Whatever has a colour of its own brings its background too, so that no theme can
make it hard to read; a test measures the contrast of each pair.
"""

__all__ = ["COLOURS", "STYLE", "TIE", "contrast"]

# What has a colour of its own: text, background; each pair is readable on its own, whatever is around it.
COLOURS: dict[str, tuple[str, str]] = {
    "bad": ("#7a120d", "#fdecea"),
    "warn": ("#5c3700", "#fff3dc"),
    "good": ("#0b4a22", "#e4f4e9"),
    "primary": ("#ffffff", "#1761ad"),
    "warning": ("#ffffff", "#8a4b00"),
    "danger": ("#ffffff", "#a3201a"),
    "success": ("#ffffff", "#1d6b35"),
}

_NOTICES = "".join(
    f".fastsd-notice.{kind}{{color:{COLOURS[kind][0]};background:{COLOURS[kind][1]}}}"
    for kind in ("bad", "warn", "good")
)
_BUTTONS = "".join(
    f".fastsd .jupyter-button.mod-{kind},.fastsd .jupyter-button.mod-{kind}:hover,"
    f".fastsd .jupyter-button.mod-{kind}:active"
    f"{{color:{COLOURS[kind][0]};background-color:{COLOURS[kind][1]}}}"
    for kind in ("primary", "warning", "danger", "success")
)

# Classes of ipywidgets 7 and 8 alike. A row wraps where it has no room, so that nothing has to be scrolled sideways;
# the labels are ipywidgets' own, because those belong to their inputs for a screen reader too. What is logged below a
# notebook's cell has no box of ours, and JupyterLab breaks its lines anywhere in a word: the last rule for <pre> lets
# it break between words, and inside of one only where that has no room on a line.
STYLE = (
    """
.fastsd{width:100%;max-width:1100px;box-sizing:border-box;container-type:inline-size}
.fastsd.widget-box,.fastsd .widget-box,.fastsd .widget-accordion{overflow:visible;max-width:100%;min-width:0}
.fastsd .widget-hbox{flex-wrap:wrap}
.fastsd .widget-html,.fastsd .widget-html-content{max-width:100%;min-width:0;height:auto;overflow-wrap:break-word}
.fastsd .widget-html-content{line-height:1.45;font-size:var(--jp-widgets-font-size,13px)}
.fastsd .widget-inline-hbox{max-width:calc(100% - 4px)}
.fastsd .widget-button,.fastsd .jupyter-button{width:auto;max-width:100%;min-width:44px;padding:0 14px;
font-size:var(--jp-widgets-font-size,13px)}
.fastsd .fastsd-field{display:flex;flex-flow:row wrap;align-items:flex-start;gap:0 14px;margin:1px 0}
.fastsd .fastsd-input{flex:0 1 440px;min-width:0;width:440px;max-width:100%}
.fastsd .fastsd-input .widget-inline-hbox{width:calc(100% - 4px);height:auto;flex-wrap:wrap;align-items:center}
.fastsd .fastsd-input .widget-inline-hbox>.widget-label{flex:0 0 150px;width:150px;text-align:left;font-weight:600;
white-space:normal;overflow:visible;line-height:1.25;height:auto;margin-right:8px}
.fastsd .fastsd-input .widget-inline-hbox>input,.fastsd .fastsd-input .widget-inline-hbox>select,
.fastsd .fastsd-input .widget-inline-hbox>textarea{flex:1 1 190px;width:190px;min-width:0;max-width:100%}
.fastsd .fastsd-input .widget-label-basic{font-weight:600;flex:1 1 190px;overflow:visible;white-space:normal;
height:auto;width:auto}
.fastsd .fastsd-wide .fastsd-input{flex:1 1 100%;width:100%}
@container (max-width:640px){.fastsd .fastsd-wide .widget-inline-hbox>.widget-label{flex-basis:100%}}
.fastsd .fastsd-wide .fastsd-input select{flex:1 1 260px;width:260px}
.fastsd .fastsd-input select:not([size]){text-overflow:ellipsis}
.fastsd .fastsd-more .widget-label{font-weight:400!important}
.fastsd .fastsd-help{flex:1 1 260px;width:260px;opacity:.85;margin-top:4px}
.fastsd .fastsd-below{flex:1 0 100%;width:100%;margin:0}
.fastsd .widget-inline-hbox>select:not([size]),.fastsd .widget-inline-hbox>input{min-height:28px;box-sizing:border-box}
.fastsd input:focus-visible,.fastsd select:focus-visible,.fastsd textarea:focus-visible,
.fastsd button:focus-visible,.fastsd [tabindex]:focus-visible{outline:2px solid #1a73e8;outline-offset:1px;
box-shadow:0 0 0 4px rgba(255,255,255,.75)}
.fastsd ::placeholder{color:inherit;opacity:.75}
.fastsd .widget-upload,.fastsd select[size],.fastsd select[multiple]{max-width:100%}
.fastsd img{max-width:100%;height:auto}
.fastsd a{color:inherit;text-decoration:underline}
.fastsd pre{white-space:pre-wrap;overflow-wrap:anywhere;word-break:normal}
.jp-Notebook .jp-OutputArea-output pre{word-break:normal}
.fastsd table{border-collapse:collapse}
.fastsd th,.fastsd td{text-align:left;padding:2px 10px 2px 0;vertical-align:middle;white-space:normal}
.fastsd-scroll{max-height:420px;overflow-y:auto;overflow-x:hidden}
.fastsd-quiet{opacity:.85}
.fastsd-notice{padding:4px 10px;margin:2px 0;border-radius:3px;line-height:1.45;overflow-wrap:break-word}
.fastsd-bar{width:100%;max-width:420px;height:14px;border:1px solid currentColor;border-radius:7px;overflow:hidden;
box-sizing:border-box;margin:6px 0}
.fastsd-bar>div{height:100%;background:#1761ad}
.fastsd-bar.good>div{background:#1d6b35}
.fastsd-bar.bad>div{background:#8a4b00}
@container (max-width:640px){.fastsd .fastsd-field{margin:4px 0}.fastsd .fastsd-help{line-height:1.3;margin-top:0}
.fastsd .fastsd-input{flex-basis:100%}}
"""
    + _NOTICES
    + _BUTTONS
)

# Runs in a frame's page: ties every field to its help and to what is wrong with it, which ipywidgets cannot say.
TIE = """
const frame=this.closest('.fastsd');if(!frame||frame.tied)return;frame.tied=true;
const name=frame.querySelector('.fastsd-name');
if(name){frame.setAttribute('role','group');frame.setAttribute('aria-label',name.textContent);}
const tie=()=>frame.querySelectorAll('.fastsd-field').forEach(row=>{const ids=[];let wrong=false;
row.querySelectorAll('.fastsd-help,.fastsd-below').forEach(part=>{
if(!part.id)part.id='fastsd-'+Math.random().toString(36).slice(2);ids.push(part.id);
if(part.classList.contains('fastsd-below')&&part.textContent.trim())wrong=true;});
row.querySelectorAll('input,select,textarea').forEach(field=>{
if(ids.length)field.setAttribute('aria-describedby',ids.join(' '));
if(wrong)field.setAttribute('aria-invalid','true');else field.removeAttribute('aria-invalid');});});
let waiting=0;new MutationObserver(()=>{clearTimeout(waiting);waiting=setTimeout(tie,60);})
.observe(frame,{childList:true,subtree:true,characterData:true});tie();
"""


def contrast(first: str, second: str) -> float:
    """The contrast of two colours (#rrggbb) between 1 and 21; text should have 4.5.

    Source: WCAG 2.2, relative luminance and contrast ratio.
    """
    high, low = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
