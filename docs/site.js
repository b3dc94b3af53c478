// A table that is wider than the window scrolls in a frame of its own, which the theme adds: the keyboard reaches it too.
new MutationObserver(() => {
  for (const frame of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) frame.tabIndex = 0
}).observe(document.documentElement, {childList: true, subtree: true})
