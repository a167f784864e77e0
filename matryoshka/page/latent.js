"use strict";
// A latent's page.

const MANY = 15; // children that are shown at first
const FEW = 8; // examples of a neighbour

async function showLatent(k, j) {
  const sae = browse.about.saes[k];
  const list = await listOf(k);
  if (!(j in list.fired)) return notThere(k, j);
  const latent = await latentOf(k, j);
  await Promise.all(latent.nearest.map(([other]) => listOf(other)));
  const largest = list.largest[j] || 1;
  const view = [
    make("h1", {}, `Latent ${j} of ${sae.name}: `, make("span", { id: "name" }, nameOf(k, j) || "no name")),
    steps(k, j, sae),
    facts(k, j, list, sae),
    nameForm(k, j),
    make("div", { class: "columns" }, around(k, j, list, sae), parents(k, latent, sae)),
    make("h2", {}, "Strongest tokens"),
    latent.top.length ? examples(latent.top, largest) : make("p", {}, "It fires on none of these tokens."),
    activations(list, latent, j),
    outputs(latent),
    make("div", { class: "columns" },
      pairs("Most similar", "cosine of decoders", k, latent.similar),
      pairs("Fire with it most", "overlap", k, latent.coactive)),
    ...(await Promise.all(latent.nearest.map((near) => sideBySide(k, j, latent, list, near)))),
    make("h2", {}, "By quantile of its activation, and at random"),
    quantiles(latent, largest),
  ];
  return { title: `Latent ${j} of ${sae.name}`, view };
}

function notThere(k, j) {
  const sae = browse.about.saes[k];
  const text = `There is no latent ${j} in ${sae.name}: it has latents 0 to ${sae.n_latents - 1}.`;
  const view = [make("h1", {}, "No such latent"), make("p", {}, text),
    make("p", {}, make("a", { href: saeHash(k) }, `All latents of ${sae.name}`))];
  return { title: "No such latent", view };
}

function steps(k, j, sae) {
  const links = [];
  if (j > 0) links.push(make("a", { href: latentHash(k, j - 1), rel: "prev" }, `← ${j - 1}`), " ");
  if (j + 1 < sae.n_latents) links.push(make("a", { href: latentHash(k, j + 1), rel: "next" }, `${j + 1} →`));
  return make("p", {}, links);
}

function facts(k, j, list, sae) {
  const n = list.fired[j];
  const level = list.level[j];
  const begin = level ? sae.widths[level - 1] : 0;
  const rows = [
    ["Level", `${level} (latents ${begin} to ${sae.widths[level] - 1})`],
    ["Reach", `in ${percent(list.reach[j])} of prefixes`],
    ["Density", n ? `${percent(n / browse.about.n_tokens)}, ${count(n)} of ${count(browse.about.n_tokens)} tokens` : "dead here: 0"],
    ["Largest activation", short(list.largest[j])],
    ["Mean where it fires", short(list.mean[j])],
  ];
  const tokens = list.tokens[j].flatMap((token) => [tokenBox(token), " "]);
  if (tokens.length) rows.push(["Characteristic tokens", tokens]);
  return make("dl", {}, rows.map(([term, text]) => make("div", {}, make("dt", {}, term), make("dd", {}, text))));
}

function nameForm(k, j) {
  const input = make("input", { id: "label", autocomplete: "off" });
  input.value = browse.names[k][j] ?? "";
  const submit = (event) => {
    event.preventDefault();
    const stored = setName(k, j, input.value.trim());
    document.getElementById("name").textContent = nameOf(k, j) || "no name";
    say(stored ? "The name is kept in this browser; “Save names” writes all of them to a file."
      : "This browser keeps nothing for this page: “Save names” writes names to a file.");
  };
  return make("form", { class: "name", onsubmit: submit }, make("label", { for: "label" }, "Your name for it"),
    input, make("button", { type: "submit" }, "Keep"));
}

function around(k, j, list, sae) {
  const part = make("section", {}, make("h2", {}, "The tree around it"));
  if (!sae.has_pairs) part.append(make("p", {}, "Pairs of so many latents were not counted."));
  else if (list.parent[j] < 0 && !list.children[j].length) {
    part.append(make("p", {}, "It has neither parent nor children."));
  } else part.append(treeAround(k, j, list));
  return part;
}

const MEASURES = ["P(parent | this)", "P(this | parent)", "above chance", "directed", "cosine"];

function parents(k, latent, sae) {
  const which = sae.widths.length > 1 ? "of an earlier level" : "that fires more widely";
  const part = make("section", {}, make("h2", {}, "Parents"));
  if (!latent.parents.length) part.append(make("p", {}, `No latent ${which} fires nearly wherever it does.`));
  else {
    const rows = latent.parents.map(([j, ...values]) => [latentLink(k, j), ...values.map(short)]);
    part.append(table(`Each ${which}, over 0.6 above chance; the first is its parent in the tree`,
      ["Latent", ...MEASURES], rows));
  }
  return part;
}

function activations(list, latent, j) {
  const [width, counts] = latent.histogram;
  const part = make("section", {}, make("h2", {}, "Activations"));
  if (list.fired[j]) part.append(histogram(counts, 0, width, `How many of ${count(list.fired[j])} activations are how large`));
  return part;
}

function outputs(latent) {
  if (!latent.promoted) return make("div", {});
  const side = (title, pairs) => table(title, ["Token", "effect"],
    pairs.map(([token, effect]) => [tokenBox(token), short(effect)]));
  const [low, width, counts] = latent.effects;
  return make("section", {},
    make("h2", {}, "Output tokens"),
    make("p", { class: "soft" }, "What an activation of 1 adds to the logits, less the mean over all tokens."),
    make("div", { class: "columns" }, side("Most promoted", latent.promoted), side("Most suppressed", latent.suppressed)),
    histogram(counts, low, width, "The effects on all output tokens"));
}

function pairs(title, measure, k, list) {
  const rows = list.map(([j, value]) => [latentLink(k, j), short(value)]);
  return make("section", {}, make("h2", {}, title), rows.length ? table("", ["Latent", measure], rows) : make("p", {}, "None."));
}

// The latent of another SAE that points along it most, beside it.
async function sideBySide(k, j, latent, list, [other, i, cosine]) {
  const sae = browse.about.saes[other];
  const [theirs, their] = await Promise.all([latentOf(other, i), listOf(other)]);
  const density = (of, n) => `fires on ${percent(of.fired[n] / browse.about.n_tokens)}`;
  return make("section", {}, make("h2", {}, `Nearest in ${sae.name}`),
    make("p", { class: "soft" }, `Cosine of decoders ${short(cosine)}.`),
    make("div", { class: "columns" },
      make("div", {}, make("h3", {}, latentLink(k, j)), make("p", { class: "soft" }, density(list, j)),
        examples(latent.top.slice(0, FEW), list.largest[j] || 1)),
      make("div", {}, make("h3", {}, latentLink(other, i)), make("p", { class: "soft" }, density(their, i)),
        examples(theirs.top.slice(0, FEW), their.largest[i] || 1))));
}

function quantiles(latent, largest) {
  const parts = latent.quantiles.map((some, q) => ({ some, title: `${q * 10}% to ${q * 10 + 10}%` })).reverse();
  parts.push({ some: latent.random, title: "At random" });
  return make("div", { class: "columns" }, parts.filter(({ some }) => some.length).map(({ some, title }) =>
    make("section", {}, make("h3", {}, title), examples(some, largest))));
}
