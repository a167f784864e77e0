"use strict";
// The list of an SAE's latents: sorted, filtered, a page at a time. Its state is in the address.

const ROWS = 100; // shown at once
const DEFAULTS = { sort: "latent", down: "", level: "", low: "", high: "", life: "", q: "", text: "" };

const COLUMNS = [
  ["latent", "Latent", (list, j) => j],
  ["level", "Level", (list, j) => list.level[j]],
  ["density", "Density", (list, j) => list.fired[j]],
  ["largest", "Largest", (list, j) => list.largest[j]],
  ["children", "Children", (list, j) => list.children[j].length],
  ["parent", "Parent", (list, j) => list.parent[j]],
];

let searches = 0; // a later search of the examples ends an earlier one

async function showList(k, query) {
  const list = await listOf(k);
  const state = { ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(query)) };
  const results = make("div", {});
  const update = () => {
    const set = Object.entries(state).filter(([key, value]) => value !== DEFAULTS[key]);
    const address = set.length ? `?${new URLSearchParams(set)}` : "";
    history.replaceState(null, "", `${saeHash(k)}${address}`);
    return drawResults(k, list, state, results, update);
  };
  const sae = browse.about.saes[k];
  const view = [
    make("h1", {}, `Latents of ${sae.name}`),
    make("p", { class: "soft" }, `${count(sae.n_latents)} latents on ${count(browse.about.n_tokens)} ` +
      `tokens. Levels end at latents ${sae.widths.map(count).join(", ")}.`),
    filters(sae, state, update),
    results,
  ];
  return { title: `Latents of ${sae.name}`, view, after: update };
}

function filters(sae, state, update) {
  let timer = 0;
  const field = (key, label, element) => {
    element.id = `filter-${key}`;
    element.value = state[key];
    element.addEventListener(element.tagName === "SELECT" ? "change" : "input", () => {
      state[key] = element.value;
      clearTimeout(timer);
      timer = setTimeout(update, element.type === "search" ? 250 : 0);
    });
    return make("span", {}, make("label", { for: element.id }, label), element);
  };
  const choice = (pairs) => make("select", {}, pairs.map(([value, text]) => make("option", { value }, text)));
  const levels = sae.widths.map((width, i) => [`${i}`, `${i} (${i ? sae.widths[i - 1] : 0} to ${width - 1})`]);
  const share = { type: "number", min: 0, max: 100, step: "any", size: 6, style: "width: 6rem" };
  return make("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
    field("level", "Level", choice([["", "any"], ...levels])),
    field("low", "Density from, %", make("input", share)),
    field("high", "to, %", make("input", share)),
    field("life", "Dead", choice([["", "shown too"], ["living", "hidden"], ["dead", "only"]])),
    field("q", "Name or token", make("input", { type: "search" })),
    field("text", "Text in the strongest examples", make("input", { type: "search" })));
}

function matches(k, list, state, j) {
  const density = (100 * list.fired[j]) / browse.about.n_tokens;
  if (state.level !== "" && list.level[j] !== Number(state.level)) return false;
  if (state.low !== "" && density < Number(state.low)) return false;
  if (state.high !== "" && density > Number(state.high)) return false;
  if (state.life === "living" && !list.fired[j]) return false;
  if (state.life === "dead" && list.fired[j]) return false;
  if (!state.q) return true;
  const wanted = state.q.toLowerCase();
  const words = [browse.names[k][j] ?? "", ...list.tokens[j].map(textOf)];
  return words.some((word) => word.toLowerCase().includes(wanted));
}

function sorted(list, state, latents) {
  const [, , key] = COLUMNS.find(([name]) => name === state.sort) ?? COLUMNS[0];
  const sign = state.down ? -1 : 1;
  return latents.sort((a, b) => sign * (key(list, a) - key(list, b)) || a - b);
}

async function drawResults(k, list, state, results, update) {
  const mine = ++searches;
  const every = list.fired.map((_, j) => j).filter((j) => matches(k, list, state, j));
  let found = every;
  if (state.text) found = await withText(k, every, state.text.toLowerCase(), () => mine !== searches);
  if (mine !== searches) return;
  found = sorted(list, state, found);
  say(`${count(found.length)} of ${count(list.fired.length)} latents`);
  results.replaceChildren(resultTable(k, list, state, found, update));
}

// Those of `latents` whose strongest examples hold the text. Every file is looked into, in turn.
async function withText(k, latents, wanted, isOver) {
  const size = browse.about.latents_a_file;
  const found = [];
  say("looking into the examples …");
  for (let i = 0; i < latents.length; i++) {
    const j = latents[i];
    const latent = await latentOf(k, j);
    if (isOver()) return found;
    const holds = ([, , , tokens]) => tokens.map(textOf).join("").toLowerCase().includes(wanted);
    if (latent.top.some(holds)) found.push(j);
    if (j % size === size - 1) say(`looked into ${count(i + 1)} of ${count(latents.length)} latents …`);
  }
  return found;
}

function resultTable(k, list, state, found, update) {
  const heads = COLUMNS.map(([name, title]) => {
    const current = state.sort === name;
    const toggle = () => {
      state.down = current && !state.down ? "1" : !current && name !== "latent" ? "1" : "";
      state.sort = name;
      update().then(() => document.getElementById(`sort-${name}`)?.focus());
    };
    const order = current ? (state.down ? "descending" : "ascending") : null;
    const arrow = current ? (state.down ? " ↓" : " ↑") : "";
    return make("th", { scope: "col", "aria-sort": order, class: wide(name) },
      make("button", { type: "button", id: `sort-${name}`, onclick: toggle }, title + arrow));
  });
  heads.push(make("th", { scope: "col", class: "left" }, "Tokens"));
  const body = make("tbody", {});
  const more = make("button", { type: "button" }, "Show more");
  const add = () => {
    const begin = body.children.length;
    body.append(...found.slice(begin, begin + ROWS).map((j) => resultRow(k, list, j)));
    more.hidden = body.children.length >= found.length;
  };
  more.addEventListener("click", add);
  add();
  if (!found.length) return make("p", {}, "No latent is like that.");
  return make("div", { class: "scroll", tabindex: 0 }, make("table", {}, make("thead", {}, make("tr", {}, heads)), body), more);
}

const wide = (name) => (["largest", "parent"].includes(name) ? "wide" : null);

function resultRow(k, list, j) {
  const parent = list.parent[j];
  const cells = [
    [latentLink(k, j), null],
    [list.level[j], null],
    [list.fired[j] ? percent(list.fired[j] / browse.about.n_tokens) : "dead", null],
    [short(list.largest[j]), "wide"],
    [list.children[j].length || "", null],
    [parent >= 0 ? latentLink(k, parent) : "", "wide"],
    [list.tokens[j].flatMap((token) => [tokenBox(token), " "]), "left"],
  ];
  return make("tr", {}, cells.map(([content, classes]) => make("td", { class: classes }, content)));
}
