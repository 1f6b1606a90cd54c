// Numbers as people read them, elements, and the state that all parts of the page share.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

const KIND_NAMES = {
  input: "input", compute: "compute", halo: "halo exchange", reshard: "re-layout", gather: "gathered",
  reduce: "all-reduce", replicated: "replicated", fallback: "no rule: whole on every rank",
};
const COMMUNICATES = new Set(["halo", "reshard", "gather", "reduce"]);

const state = { item: 0, rank: 0, listeners: [] };

/** Choose a node, a rank or both; every part of the page follows. */
function choose(change) {
  const before = { item: state.item, rank: state.rank };
  Object.assign(state, change);
  if (before.item !== state.item || before.rank !== state.rank || change.force) {
    for (const follow of state.listeners) follow(before, change);
  }
}

function sizeText(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (Math.abs(count) >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${unit === 0 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

function countText(count) {
  if (count === null || count === undefined) return "";
  const units = ["", " k", " M", " G", " T", " P"];
  let unit = 0;
  if (Math.abs(count) < 10000) return Math.round(count).toLocaleString("en");
  while (Math.abs(count) >= 999.5 && unit < units.length - 1) { count /= 1000; unit += 1; }
  return `${count >= 100 ? Math.round(count) : count.toFixed(1)}${units[unit]}`;
}

const flopText = (flops) => `${countText(flops)}FLOP`.replace(/^([\d,]+)FLOP/, "$1 FLOP");
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

/** An element with attributes and children; text is only ever text. */
function make(name, attributes = {}, ...children) {
  const element = name.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "click") element.addEventListener("click", value);
    else if (key === "part") element.style.setProperty("--part", value);
    else if (key === "kind") element.style.setProperty("--tone", `var(--kind-${value})`);
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

/** The coordinates of a rank on the mesh, by axis. */
function coordinatesOf(rank) {
  const found = {};
  for (const [name, count] of [...data.mesh].reverse()) {
    found[name] = rank % count;
    rank = Math.floor(rank / count);
  }
  return found;
}

function rankAt(coordinates) {
  return data.mesh.reduce((rank, [name, count]) => rank * count + (coordinates[name] || 0), 0);
}

function placeText(rank) {
  const at = coordinatesOf(rank);
  return data.mesh.map(([name]) => `${name}=${at[name]}`).join(", ") || "single";
}

const inputCount = data.items.filter((item) => item.kind === "input").length;
