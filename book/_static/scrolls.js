// What is wider than its place scrolls; as long as more lies to the right, it fades there (book.css).
"use strict";

const FADE = 40;  // pixels, 2.5rem in book.css

// A formula in a line has room; what sticks out of it is its hidden text for screen readers.
function mark(box) {
  const more = box.clientWidth > 2 * FADE
    && box.scrollWidth - box.clientWidth - box.scrollLeft > 2;
  box.classList.toggle("goes-on", more);
}

function watch() {
  const wide = [...document.querySelectorAll("article *")].filter((node) => {
    const style = getComputedStyle(node);
    return ["auto", "scroll"].includes(style.overflowX);
  });
  const sizes = new ResizeObserver((seen) => seen.forEach(({ target }) => mark(target)));
  for (const box of wide) {
    mark(box);
    sizes.observe(box);
    if (box.dataset.watched) continue;
    box.dataset.watched = "yes";
    box.addEventListener("scroll", () => mark(box), { passive: true });
  }
}

addEventListener("load", () => {
  // A picture scrolls by itself, and its caption stays.
  for (const picture of document.querySelectorAll("article figure > img")) {
    const box = document.createElement("div");
    box.className = "picture";
    picture.replaceWith(box);
    box.append(picture);
  }
  watch();
  // Formulas come later, and a solution is wide only once it is open.
  window.MathJax?.startup?.promise?.then(watch);
  document.addEventListener("toggle", watch, true);
  matchMedia("(max-width: 720px)").addEventListener("change", watch);
});
