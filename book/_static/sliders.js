// Sliders of the page "Try it": numbers that were measured or computed when the book was made are
// in the page as JSON, and nothing is asked for.  slr/chapters/sliders.py says what is in it.
"use strict";

function element(parent, tag, attributes, words) {
  const space = parent.namespaceURI?.endsWith("svg") || tag === "svg";
  const made = space
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (words !== undefined) made.textContent = words;
  parent.append(made);
  return made;
}

function scale(axis, from, to) {
  const f = axis.log ? Math.log : (value) => value;
  const low = f(axis.low), high = f(axis.high);
  return (value) => from + (to - from) * (f(value) - low) / (high - low);
}

// The chart: lines that were chosen in colour, those beside them faint, a dot at the last slider.
function draw(data, chosen, place) {
  const width = Math.max(place.clientWidth, 280), height = Math.min(360, Math.max(260, width / 2));
  const along = chosen.at(-1), lead = chosen.slice(0, -1);
  const x = scale(data.x, 66, width - 16), y = scale(data.y, height - 46, 12);
  place.replaceChildren();
  const svg = element(place, "svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": true });
  for (const [value, words] of data.x.ticks) {
    element(svg, "path", { class: "grid", d: `M${x(value)} 12V${height - 46}` });
    element(svg, "text", { x: x(value), y: height - 28, "text-anchor": "middle" }, words);
  }
  for (const [value, words] of data.y.ticks) {
    element(svg, "path", { class: "grid", d: `M66 ${y(value)}H${width - 16}` });
    element(svg, "text", { x: 60, y: y(value) + 4, "text-anchor": "end" }, words);
  }
  const middle = (height - 34) / 2;
  element(svg, "text", { x: (width + 50) / 2, y: height - 8, "text-anchor": "middle" }, data.x.label);
  element(svg, "text", {
    "text-anchor": "middle", transform: `translate(13 ${middle}) rotate(-90)`,
  }, data.y.label);
  const near = data.lines.filter((line) => line.at.slice(0, -1).every((v, i) => v === lead[i]));
  const on = near.filter((line) => line.at.at(-1) === lead.at(-1));
  for (const line of [...near.filter((each) => !on.includes(each)), ...on]) {
    const d = line.x.map((value, i) => `${i ? "L" : "M"}${x(value)} ${y(line.y[i])}`).join("");
    const look = on.includes(line) ? "line" : "line faint";
    const dash = line.dash ? { "stroke-dasharray": line.dash } : {};
    element(svg, "path", { class: look, stroke: line.color, d, ...dash });
  }
  for (const line of on) {
    const where = { cx: x(line.x[along]), cy: y(line.y[along]), r: 7, fill: line.color };
    element(svg, "circle", { class: "here", ...where });
  }
  return on;
}

function start(box) {
  const data = JSON.parse(box.querySelector("script[type='application/json']").textContent);
  const chosen = data.controls.map((control) => control.start);
  const form = element(box, "div", { class: "controls" });
  const place = element(box, "div", { class: "chart" });
  const says = element(box, "p", { class: "says", role: "status" });
  const show = () => {
    const on = draw(data, chosen, place);
    says.replaceChildren();
    for (const line of on) {
      const words = element(says, "span", {});
      element(words, "b", { style: `background:${line.color}` });
      words.append(line.says[chosen.at(-1)]);
    }
  };
  data.controls.forEach((control, i) => {
    const label = element(form, "label", {}, control.label + " ");
    const shown = element(label, "output", {}, control.values[control.start]);
    const input = element(label, "input", {
      type: "range", min: 0, max: control.values.length - 1, step: 1, value: control.start,
      "aria-label": control.label, "aria-valuetext": control.values[control.start],
    });
    input.addEventListener("input", () => {
      chosen[i] = Number(input.value);
      shown.textContent = control.values[chosen[i]];
      input.setAttribute("aria-valuetext", shown.textContent);
      show();
    });
  });
  box.append(box.querySelector("details"));
  box.querySelector("details").open = false; // it is the fallback, and was open
  new ResizeObserver(show).observe(place);
  show();
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".try").forEach(start));
