"""The keys of the correction table, in the page: a notebook's text field knows none that go to another field.

Enter says that the line is right and goes to the next one, over the end of a page of the table too; Shift+Enter goes
back; Escape takes the correction back. The buttons beside a field are passed by Tab, for these keys do what they do.
"""

import html

__all__ = ["draw_keys"]

# As an attribute of an image that cannot be shown, because a script that is put into a page this way is not run. The
# notebook's own shortcuts are kept away: Shift+Enter would run the cell and draw the table anew.
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


def draw_keys() -> str:
    """HTML that gives the keys to the box with the class fastsd-corrections around it."""
    code = html.escape(" ".join(_CODE.split()), quote=True)
    return f'<img src="data:," alt="" style="display:none" onerror="{code}">'
