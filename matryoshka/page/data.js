"use strict";
// What is loaded, and when: scripts on demand, since a page from disk may load nothing else.

const MAX_FILES = 40; // of latents in full, that are held

const browse = {
  about: null, // of data/run.js
  lists: new Map(), // of an SAE's number: its columns, and the children of each latent
  files: new Map(), // of "SAE/file": latents in full
  waiting: new Map(), // of a script's path: what to do when it is there

  run(about) {
    this.about = about;
    this.names = loadNames(about);
    start();
  },

  list(k, columns) {
    const children = columns.fired.map(() => []);
    columns.parent.forEach((parent, j) => parent >= 0 && children[parent].push(j));
    for (const some of children) some.sort((a, b) => columns.fired[b] - columns.fired[a] || a - b);
    this.lists.set(k, { ...columns, children });
  },

  latents(k, file, latents) {
    this.files.set(`${k}/${file}`, latents);
    if (this.files.size > MAX_FILES) this.files.delete(this.files.keys().next().value);
  },
};

function load(path) {
  if (!browse.waiting.has(path)) {
    const loaded = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.charset = "utf-8";
      script.src = path;
      script.onload = () => resolve(script.remove());
      script.onerror = () => reject(new Error(`${path} is missing: was the whole folder copied?`));
      document.head.append(script);
    });
    browse.waiting.set(path, loaded.finally(() => browse.waiting.delete(path)));
  }
  return browse.waiting.get(path);
}

async function listOf(k) {
  if (!browse.lists.has(k)) await load(`data/${k}/list.js`);
  return browse.lists.get(k);
}

async function fileOf(k, file) {
  const key = `${k}/${file}`;
  if (!browse.files.has(key)) await load(`data/${k}/latents_${file}.js`);
  return browse.files.get(key);
}

async function latentOf(k, j) {
  const size = browse.about.latents_a_file;
  const latents = await fileOf(k, Math.floor(j / size));
  return latents[j % size];
}

// ---------------------------------------------------------------------------------- names

const NAMES = "latent names";

function kept(key) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? {};
  } catch {
    return {}; // no storage here, or not ours
  }
}

function keep(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// Names from the file, and over them what the user typed, by SAE and by latent.
function loadNames(about) {
  const typed = kept(NAMES);
  return about.saes.map((sae) => ({ ...about.labels[sae.name], ...typed[sae.sha256] }));
}

function setName(k, j, name) {
  const sae = browse.about.saes[k];
  const typed = kept(NAMES);
  typed[sae.sha256] = { ...typed[sae.sha256], [j]: name };
  browse.names[k][j] = name;
  return keep(NAMES, typed);
}

// The names of all SAEs as labels.json has them.
function allNames() {
  const all = {};
  browse.about.saes.forEach((sae, k) => {
    const given = Object.entries(browse.names[k]).filter(([, name]) => name);
    if (given.length) all[sae.name] = Object.fromEntries(given);
  });
  return all;
}

const textOf = (token) => (token < 0 ? "?" : browse.about.texts[token]);

// What a latent is called: by the user, or else by its most characteristic token.
function nameOf(k, j) {
  const given = browse.names[k][j];
  if (given) return given;
  const list = browse.lists.get(k);
  const [token] = list ? list.tokens[j] : [];
  return token === undefined ? "" : visible(textOf(token)).trim() || visible(textOf(token));
}

// A token's text with its line breaks to be seen.
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
