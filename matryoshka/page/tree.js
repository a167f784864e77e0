"use strict";
// The forest of an SAE as an outline that opens. A part that is closed is not made before it opens.

const ALL_AT_ONCE = 3000; // nodes that "Open all" opens at most

// A node; `open` says of a latent whether it is shown open, `current` is the one that is looked at.
function treeNode(k, j, list, open, current = -1) {
  const children = list.children[j];
  const link = latentLink(k, j, { "aria-current": j === current ? "true" : null });
  const given = list.given && list.parent[j] >= 0 ? `, parent fires on ${percent(list.given[j])} of them` : "";
  const note = make("small", {}, ` ${percent(list.fired[j] / browse.about.n_tokens)} of tokens${given}`);
  if (!children.length) return make("li", { class: "leaf" }, link, note);
  const inside = make("ul", {});
  const details = make("details", {}, make("summary", {}, link, note, make("small", {}, `, ${browse.lists.get(k).children[j].length} below`)), inside);
  const fill = () => inside.children.length || addSome(inside, children, (c) => treeNode(k, c, list, open, current));
  details.addEventListener("toggle", () => details.open && fill());
  if (open(j)) {
    fill();
    details.open = true;
  }
  return make("li", {}, details);
}

// Adds the first of many, and a button for the others.
function addSome(element, latents, node) {
  element.append(...latents.slice(0, MANY).map(node));
  if (latents.length <= MANY) return;
  const rest = make("button", { type: "button" }, `${latents.length - MANY} more`);
  rest.addEventListener("click", () => {
    rest.parentElement.replaceWith(...latents.slice(MANY).map(node));
  });
  element.append(make("li", {}, rest));
}

function ancestors(list, j) {
  const found = [];
  for (let at = list.parent[j]; at >= 0; at = list.parent[at]) found.push(at);
  return found;
}

// From the root above a latent down to its children.
function treeAround(k, j, list) {
  const above = ancestors(list, j);
  const path = new Set([j, ...above]);
  const only = { ...list, children: list.children.map((some, i) => (i !== j && path.has(i) ? some.filter((c) => path.has(c)) : some)) };
  const root = above.length ? above[above.length - 1] : j;
  return make("ul", { class: "tree" }, treeNode(k, root, only, (i) => path.has(i), j));
}

async function showTree(k, query) {
  const opened = new Set((new URLSearchParams(query).get("open") ?? "").split(",").map(Number));
  const sae = browse.about.saes[k];
  const list = await listOf(k);
  const title = `The tree of ${sae.name}`;
  if (!sae.has_pairs) return { title, view: [make("h1", {}, title), make("p", {}, "Pairs of so many latents were not counted.")] };
  const roots = list.fired.map((_, j) => j).filter((j) => list.parent[j] < 0 && list.children[j].length);
  const first = (j) => Number(opened.has(j)); // those that the address opens
  roots.sort((a, b) => first(b) - first(a) || list.fired[b] - list.fired[a] || a - b);
  const alone = list.fired.filter((n, j) => n && list.parent[j] < 0 && !list.children[j].length).length;
  const below = list.parent.filter((parent) => parent >= 0).length;
  const tree = make("ul", { class: "tree", id: "forest" });
  const draw = (open) => {
    tree.replaceChildren();
    addSome(tree, roots, (j) => treeNode(k, j, list, open));
  };
  const openAll = () => {
    let left = ALL_AT_ONCE;
    draw(() => left-- > 0);
  };
  draw(query ? (j) => opened.has(j) : () => false);
  const view = [
    make("h1", {}, title),
    make("p", {}, `${count(roots.length)} roots, ${count(below)} latents below a parent; ${count(alone)} that fire have neither parent nor children.`),
    make("p", {}, make("button", { type: "button", id: "open-all", onclick: openAll }, "Open all"), " ",
      make("button", { type: "button", onclick: () => draw(() => false) }, "Close all")),
    tree,
  ];
  return { title, view };
}
