// Reads the built pages for paper and for readers without scripts: formulas become SVG, and what
// only a screen can use goes away.  Run by publish.py in Chromium; sends what it made to /-/told.
"use strict";

const USELESS = "script, style, link, button, input, iframe, .headerlink, .onlyprint,"
  + " .skip-link, .sd-summary-state-marker, .on-screen-only";

const name = (page) => page.replace(/\.html$/, "").replaceAll("/", "-");

function target(link, page, all) {
  // Where a link leads in the new book; null if what it names is not in it.
  const url = new URL(link, `${location.origin}/${page}`);
  if (url.origin !== location.origin) return url.href;
  const to = decodeURIComponent(url.pathname.slice(1));
  if (!all.includes(to)) return null;
  const id = decodeURIComponent(url.hash.slice(1));
  if (ONE) return `#${name(to)}${id ? `--${id}` : ""}`;
  return `${name(to)}.xhtml${id ? `#${id}` : ""}`;
}

function mend(article, page, all) {
  // Ids, links and images as they are called in the new book; lists the images.
  const images = new Set();
  for (const node of article.querySelectorAll(USELESS)) node.remove();
  for (const node of article.querySelectorAll("noscript")) node.replaceWith(...node.childNodes);
  for (const node of article.querySelectorAll("a[href]")) {
    const to = target(node.getAttribute("href"), page, all);
    if (to === null) node.replaceWith(...node.childNodes);
    else node.setAttribute("href", to);
  }
  for (const node of article.querySelectorAll("img")) {
    const url = new URL(node.getAttribute("src"), `${location.origin}/${page}`);
    const file = decodeURIComponent(url.pathname.slice(1));
    images.add(file);
    node.setAttribute("src", `/${file}`);
    node.removeAttribute("loading");
  }
  for (const node of article.querySelectorAll(".admonition.dropdown")) {
    const details = document.createElement("details");
    details.className = node.className.replace("dropdown", "").replace("toggle", "");
    details.append(...node.childNodes);
    const title = details.querySelector(":scope > .admonition-title");
    const summary = document.createElement("summary");
    summary.append(...(title ? title.childNodes : ["Show"]));
    title?.remove();
    details.prepend(summary);
    if (node.id) details.id = node.id;
    node.replaceWith(details);
  }
  for (const node of article.querySelectorAll("details.hide > summary")) {
    node.parentElement.classList.add("code");
    node.replaceChildren(node.closest(".tag_solution") ? "Solution" : "Code");
  }
  for (const node of article.querySelectorAll("dl")) {
    if (node.querySelector(":scope > dt")) continue;  // a list of nothing: a long signature's lines
    const lines = document.createElement("div");
    lines.className = "lines";
    for (const { childNodes } of [...node.children]) {
      lines.append(document.createElement("div"));
      lines.lastChild.append(...childNodes);
    }
    node.replaceWith(lines);
  }
  for (const what of ["align", "valign", "halign", "border"])
    for (const node of article.querySelectorAll(`[${what}]`)) node.removeAttribute(what);
  if (!ONE) return [...images];
  for (const node of article.querySelectorAll("details")) node.open = true;
  for (const node of article.querySelectorAll("[id]")) node.id = `${name(page)}--${node.id}`;
  return [...images];
}

function draw() {
  // Each formula's picture in place of its container, with its TeX for those who cannot see it.
  for (const item of MathJax.startup.document.math) {
    const root = item.typesetRoot, picture = root.querySelector("svg");
    picture.setAttribute("aria-label", item.math.trim());
    picture.setAttribute("role", "img");
    picture.removeAttribute("focusable");
    for (const node of picture.querySelectorAll("path:not([d])")) node.remove();  // a space
    for (const node of picture.querySelectorAll("*"))
      for (const what of Object.keys(node.dataset)) delete node.dataset[what];
    const span = document.createElement("span");
    span.className = item.display ? "formula shown" : "formula";
    span.append(picture);
    root.replaceWith(span);
  }
}

function fit(article) {
  // What is wider than the column is made smaller; lists what would have to be less than half.
  const width = article.clientWidth + 1, small = [];
  for (const node of article.querySelectorAll("table, pre")) {
    if (node.parentElement.closest("table, pre")) continue;
    const scale = width / node.scrollWidth;
    if (scale >= 1) continue;
    node.style.zoom = scale.toFixed(3);
    if (scale < 0.5) small.push(node.textContent.trim().slice(0, 60));
  }
  return small;
}

async function collect(all) {
  const found = [];
  for (const page of all) {
    const text = await (await fetch(`/${page}`)).text();
    const article = new DOMParser().parseFromString(text, "text/html").querySelector("article");
    const images = mend(article, page, all);
    document.body.append(document.adoptNode(article));
    const title = article.querySelector("h1").textContent.trim();
    found.push({ page, name: name(page), title, images, article });
  }
  await MathJax.startup.promise;
  await MathJax.typesetPromise();
  const wrong = [];
  for (const item of MathJax.startup.document.math)  // an unknown command is only written in red
    if (item.typesetRoot.querySelector('[data-mjx-error], [fill="red"]')) wrong.push(item.math);
  const formulas = [...MathJax.startup.document.math].length;
  draw();
  for (const image of document.images) await image.decode().catch(() => wrong.push(image.src));
  const xml = new XMLSerializer();
  const pages = found.map(({ article, ...rest }) => {
    const small = fit(article);
    if (!ONE) {
      for (const node of article.querySelectorAll("table, pre")) node.style.removeProperty("zoom");
      for (const node of article.querySelectorAll("img"))
        node.setAttribute("src", `images/${node.getAttribute("src").split("/").pop()}`);
    }
    const body = [...article.childNodes].map((node) => xml.serializeToString(node)).join("");
    return { ...rest, small, body };
  });
  return { pages, formulas, wrong };
}

window.addEventListener("load", async () => {
  let body;
  try {
    body = await collect(PAGES);
  } catch (error) {
    body = { failed: `${error.stack || error}` };
  }
  await fetch("/-/told", { method: "POST", body: JSON.stringify(body) });
  document.body.replaceChildren();
});
