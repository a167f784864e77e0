"use strict";
// Which view an address names, keys, and what is at the top of every page.

const byId = (id) => document.getElementById(id);
let current = { k: 0, j: null };
let shows = 0; // a later view replaces an earlier one that is still being loaded

function start() {
  const { about } = browse;
  const of = [about.of.model, about.of.layer !== undefined && `layer ${about.of.layer}`, about.of.split];
  byId("title").textContent = [about.title, ...of.filter(Boolean)].join(" · ");
  byId("sae").append(...about.saes.map((sae, k) => make("option", { value: k }, sae.name)));
  byId("sae").addEventListener("change", (event) => (location.hash = saeHash(Number(event.target.value))));
  byId("find").addEventListener("submit", find);
  byId("skip").addEventListener("click", () => byId("main").focus());
  byId("theme").addEventListener("click", () => setTheme(theme() === "dark" ? "light" : "dark", true));
  byId("export").addEventListener("click", exportNames);
  byId("main").addEventListener("click", sayValue);
  setTheme(theme(), false);
  addEventListener("hashchange", show);
  addEventListener("keydown", pressed);
  show();
}

// "#/SAE/12", "#/SAE/tree?open=3,17", "#/SAE?sort=density", or nothing.
function route() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name = "", what = ""] = path.split("/").map(decoded);
  const k = name ? browse.about.saes.findIndex((sae) => sae.name === name) : 0;
  return { name, k, what, query };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

async function viewOf({ name, k, what, query }) {
  if (k < 0) {
    const names = browse.about.saes.map((sae) => sae.name).join(", ");
    return { title: "No such SAE", view: [make("h1", {}, "No such SAE"), make("p", {}, `There is no SAE ${name} here, only ${names}.`)] };
  }
  if (what === "") return showList(k, query);
  if (what === "tree") return showTree(k, query);
  return /^\d+$/.test(what) ? showLatent(k, Number(what)) : notThere(k, what);
}

async function show() {
  const mine = ++shows;
  const at = route();
  searches++; // ends a search of the list that is left
  say("");
  let found;
  try {
    found = await viewOf(at);
  } catch (error) {
    found = { title: "Not loaded", view: [make("h1", {}, "Not loaded"), make("p", {}, error.message)] };
  }
  if (mine !== shows) return;
  current = { k: Math.max(0, at.k), j: /^\d+$/.test(at.what) ? Number(at.what) : null };
  byId("sae").value = current.k;
  byId("to-list").href = saeHash(current.k);
  byId("to-tree").href = `${saeHash(current.k)}/tree`;
  document.title = `${found.title} · ${browse.about.title}`;
  byId("main").replaceChildren(...found.view);
  byId("main").focus({ preventScroll: true });
  scrollTo(0, 0);
  await found.after?.();
  byId("main").dataset.shown = location.hash;
}

function find(event) {
  event.preventDefault();
  const wanted = byId("search").value.trim();
  const query = wanted ? `?${new URLSearchParams({ q: wanted })}` : "";
  location.hash = /^\d+$/.test(wanted) ? latentHash(current.k, wanted) : `${saeHash(current.k)}${query}`;
}

function pressed(event) {
  const inField = event.target.closest?.("input, select, textarea");
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (inField) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const { k, j } = current;
  const n = browse.about.saes[k].n_latents;
  const parent = browse.lists.get(k)?.parent[j] ?? -1;
  const go = {
    n: () => j !== null && j + 1 < n && latentHash(k, j + 1),
    p: () => j !== null && j > 0 && latentHash(k, Math.min(j, n) - 1),
    u: () => parent >= 0 && latentHash(k, parent),
    l: () => saeHash(k),
    t: () => `${saeHash(k)}/tree`,
  };
  if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
  } else if (Object.hasOwn(go, event.key)) location.hash = go[event.key]() || location.hash;
}

// On a phone nothing hovers: a token that is pressed says its activation.
function sayValue(event) {
  const { value } = event.target.dataset;
  if (value) say(`“${event.target.textContent}”: activation ${short(Number(value))}`);
}

function theme() {
  const chosen = kept("theme").is;
  return chosen ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function setTheme(name, isChosen) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light" : "Dark";
  if (isChosen) keep("theme", { is: name });
}

function exportNames() {
  const text = JSON.stringify(allNames(), null, 1) + "\n";
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  make("a", { href: address, download: "labels.json" }).click();
  URL.revokeObjectURL(address);
}
