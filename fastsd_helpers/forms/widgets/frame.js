/* Once in the page of each frame: ties every field to its help and to what is wrong with it, which ipywidgets cannot say;
   and keeps names that have hyphens (files, models, flags) whole, where a browser would break the line in them. */
const frame = this.closest('.fastsd');
if (!frame || frame.tied) return;
frame.tied = true;
const name = frame.querySelector('.fastsd-name');
if (name) { frame.setAttribute('role', 'group'); frame.setAttribute('aria-label', name.textContent); }
const tie = () => frame.querySelectorAll('.fastsd-field').forEach(row => {
  const ids = [];
  let wrong = false;
  row.querySelectorAll('.fastsd-help,.fastsd-below').forEach(part => {
    if (!part.id) part.id = 'fastsd-' + Math.random().toString(36).slice(2);
    ids.push(part.id);
    if (part.classList.contains('fastsd-below') && part.textContent.trim()) wrong = true;
  });
  row.querySelectorAll('input,select,textarea').forEach(field => {
    if (ids.length) field.setAttribute('aria-describedby', ids.join(' '));
    if (wrong) field.setAttribute('aria-invalid', 'true'); else field.removeAttribute('aria-invalid');
  });
});
const word = /((?<!\S)(?=\S{1,36}(?!\S))\S*-\S+)/;
const keep = () => {
  const walk = document.createTreeWalker(frame, NodeFilter.SHOW_TEXT), found = [];
  while (walk.nextNode()) {
    const own = walk.currentNode.parentElement.closest('.fastsd-word,style,script,select,button,textarea,pre,svg');
    if (!own && word.test(walk.currentNode.data)) found.push(walk.currentNode);
  }
  found.forEach(text => text.replaceWith(...text.data.split(word).map((part, at) => {
    const kept = at % 2 ? document.createElement('span') : part;
    if (at % 2) { kept.className = 'fastsd-word'; kept.textContent = part; }
    return kept;
  })));
};
const look = () => { tie(); keep(); };
let waiting = 0;
new MutationObserver(() => { clearTimeout(waiting); waiting = setTimeout(look, 60); })
  .observe(frame, {childList: true, subtree: true, characterData: true});
look();
