// What is wider than the window scrolls in a frame of its own: a table in one that the theme adds, and a block of code.
// The keyboard reaches both.
const reach = () => {
  for (const frame of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex]), .md-typeset pre > code:not([tabindex])"))
    if (frame.tagName !== "CODE" || frame.scrollWidth > frame.clientWidth) frame.tabIndex = 0
}
new MutationObserver(reach).observe(document.documentElement, {childList: true, subtree: true})
addEventListener("resize", reach)
