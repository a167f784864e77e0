"use strict";
// Elements. Text goes in as text, never as HTML.

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

const percent = (share) => {
  const digits = share >= 0.1 ? 1 : share >= 0.001 ? 2 : 4;
  return `${(100 * share).toFixed(digits)}%`;
};

function short(value) {
  if (value === 0) return "0";
  return Math.abs(value) < 1000 ? value.toPrecision(3) : count(Math.round(value));
}
const count = (n) => n.toLocaleString("en");

const saeHash = (k) => `#/${encodeURIComponent(browse.about.saes[k].name)}`;
const latentHash = (k, j) => `${saeHash(k)}/${j}`;

function latentLink(k, j, more = {}) {
  const name = nameOf(k, j);
  return make("a", { href: latentHash(k, j), ...more }, name ? `${j} ${name}` : `${j}`);
}

const tokenBox = (token) => make("span", { class: "token" }, visible(textOf(token)));

function table(caption, headers, rows) {
  const head = make("tr", {}, headers.map((h) => make("th", { scope: "col" }, h)));
  const body = rows.map((row) => make("tr", {}, row.map((cell) => make("td", {}, cell))));
  return make("div", { class: "scroll", tabindex: 0 }, make("table", {},
    caption && make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, body)));
}

// One example: its activation, then its context, coloured by how strongly the latent fires.
function example([row, position, place, tokens, pairs], largest) {
  const values = new Map();
  for (let i = 0; i < pairs.length; i += 2) values.set(pairs[i], pairs[i + 1]);
  const spans = tokens.map((token, i) => {
    const value = values.get(i);
    const classes = [i === place && "peak", value !== undefined && "fires"].filter(Boolean).join(" ");
    const span = make("span", { class: classes || null }, visible(textOf(token)));
    if (value !== undefined) {
      const depth = 0.12 + 0.88 * Math.min(1, value / largest);
      span.style.background = `rgb(var(--glow) / ${depth.toFixed(2)})`;
      span.title = `activation ${short(value)}`;
      span.dataset.value = value;
    }
    return span;
  });
  const where = `row ${row}, from position ${position}`;
  return make("li", {},
    make("span", { class: "value" }, short(values.get(place) ?? 0)),
    make("span", { class: "context", title: where }, spans));
}

const examples = (list, largest) =>
  make("ol", { class: "examples" }, list.map((one) => example(one, largest)));

// Bars of counts; what they show is said in words, too.
function histogram(counts, low, width, label) {
  const last = counts.findLastIndex((n) => n > 0);
  const first = low === 0 ? 0 : counts.findIndex((n) => n > 0);
  const shown = counts.slice(Math.max(0, first), last + 1);
  const highest = Math.max(1, ...shown);
  const namespace = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(namespace, "svg");
  svg.setAttribute("viewBox", `0 0 ${Math.max(1, shown.length)} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const begin = low + Math.max(0, first) * width;
  const end = low + (last + 1) * width;
  svg.setAttribute("aria-label", `${label}, from ${short(begin)} to ${short(end)}`);
  shown.forEach((n, i) => {
    const bar = document.createElementNS(namespace, "rect");
    const height = n ? Math.max(1, (95 * n) / highest) : 0;
    const shape = { x: i + 0.05, y: 100 - height, width: 0.9, height };
    for (const [name, value] of Object.entries(shape)) bar.setAttribute(name, value);
    const title = document.createElementNS(namespace, "title");
    title.textContent = `${short(begin + i * width)} to ${short(begin + (i + 1) * width)}: ${count(n)}`;
    bar.append(title);
    svg.append(bar);
  });
  const ends = make("div", { class: "ends soft" }, make("span", {}, short(begin)),
    make("span", {}, `highest bar ${count(highest)}`), make("span", {}, short(end)));
  return make("div", {}, svg, ends);
}

function say(text) {
  document.getElementById("status").textContent = text;
}
