// The list of nodes: filter, order, choice; and what is known of the chosen one.
const COLUMNS = [
  ["number", "#", (item) => item.number + 1],
  ["name", "node", (item) => item.name],
  ["op", "operator", (item) => item.op],
  ["halo", "halo", (item) => haloText(item, true)],
  ["sent", "sent", (item) => (item.sent ? sizeText(item.sent) : "")],
  ["messages", "messages", (item) => (item.messages ? countText(item.messages) : "")],
  ["live", "memory", (item) => (item.live ? sizeText(item.live) : "")],
  ["flops", "FLOP", (item) => (item.flops ? countText(item.flops) : "")],
  ["text", "layout", (item) => item.text],
];
const CHOICES = [
  ["all", "All", () => true], ["communication", "Communication", (item) => COMMUNICATES.has(item.kind)],
  ["computation", "Computation", (item) => !COMMUNICATES.has(item.kind)],
];
const filter = { text: "", choice: "all" };
const rows = [];

data.items.forEach((item, number) => {
  item.number = number;
  item.readBy = [];
});
for (const item of data.items) for (const source of item.reads || []) data.items[source].readBy.push(item.number);

function haloText(item, short) {
  const parts = Object.entries(item.halo || {}).map(([axis, [low, high]]) => {
    const layout = data.layouts[item.layout];
    const split = layout.axes[axis];
    const name = split === null ? `axis ${axis}` : data.axes[split].mesh;
    return `${short ? name[0] : name} ${low}+${high}`;
  });
  return parts.join(short ? " " : ", ");
}

function buildRows() {
  const mostLive = Math.max(1, ...data.items.map((item) => item.live || 0));
  const shown = COLUMNS.filter(([key]) => data.items.some((item) => key === "halo" ? haloText(item) : key === "number" || item[key]));
  byId("columns").append(...shown.map(([key, title]) =>
    make("th", { scope: "col", class: ["name", "op", "text", "halo"].includes(key) ? "text" : "" }, title)));
  for (const item of data.items) {
    const row = make("tr", { kind: item.kind, class: COMMUNICATES.has(item.kind) ? "" : "plain" });
    for (const [key, title, text] of shown) row.append(cellOf(item, key, title, text(item), mostLive));
    row.addEventListener("click", () => choose({ item: item.number }));
    rows.push(row);
  }
  byId("rows").append(...rows);
}

function cellOf(item, key, title, text, mostLive) {
  if (key === "name") return make("td", { class: "name text" }, make("button", { type: "button", title: text, tabindex: "-1" }, text));
  if (key === "op") return make("td", { class: "text" }, make("span", { class: "badge" }, text));
  const attributes = { "data-label": key === "text" ? null : title };
  if (key === "text") Object.assign(attributes, { class: "layout text", title: text });
  if (key === "halo") attributes.class = "text";
  if (key === "live" && item.live) Object.assign(attributes, { class: "meter", part: `${(60 * item.live / mostLive).toFixed(1)}px` });
  return make("td", attributes, String(text));
}

function applyFilter() {
  const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean);
  const belongs = CHOICES.find(([key]) => key === filter.choice)[2];
  let count = 0;
  data.items.forEach((item, i) => {
    const text = `${item.name} ${item.op} ${item.text} ${KIND_NAMES[item.kind]}`.toLowerCase();
    const matches = belongs(item) && words.every((word) => text.includes(word));
    rows[i].hidden = !matches;
    count += matches;
  });
  byId("count").textContent = count === data.items.length ? plural(count, "node") : `${count} of ${plural(data.items.length, "node")}`;
  byId("nothing").hidden = rows.some((row) => !row.hidden);
}

/** Arrow keys go from node to node, as in a list; only the chosen one is reached with Tab. */
function moveWithKeys(event) {
  const visible = rows.filter((row) => !row.hidden);
  const place = visible.indexOf(rows[state.item]);
  const steps = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: visible.length - 1, PageDown: place + 10, PageUp: place - 10 };
  if (!(event.key in steps) || !visible.length || !event.target.closest("#rows")) return;
  event.preventDefault();
  const next = visible[Math.min(visible.length - 1, Math.max(0, steps[event.key]))];
  choose({ item: rows.indexOf(next) });
  next.querySelector("button").focus({ preventScroll: true });
}

function showChosen(before) {
  const item = data.items[state.item];
  for (const [row, is] of [[rows[before.item], false], [rows[state.item], true]]) {
    row.toggleAttribute("aria-current", is);
    row.querySelector("button").tabIndex = is ? 0 : -1;
    if (is) row.setAttribute("aria-current", "true");
  }
  const [list, row] = [byId("list"), rows[state.item]];
  const [top, bottom] = [row.offsetTop - 40, row.offsetTop + row.offsetHeight];
  if (top < list.scrollTop) list.scrollTop = top;
  else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight + 8;
  const goTo = (number) => make("button", { type: "button", click: () => choose({ item: number }) }, data.items[number].name);
  const links = (label, numbers) => (numbers.length ? make("p", { class: "links" }, `${label} `, ...numbers.slice(0, 12).map(goTo),
    numbers.length > 12 ? ` and ${numbers.length - 12} more` : "") : "");
  const layout = item.owned === undefined ? make("code", {}, item.text)
    : make("span", {}, "owned ", make("code", {}, item.owned_text), " \u2192 needed ", make("code", {}, item.text));
  const figures = [item.sent && `${sizeText(item.sent)} in ${plural(item.messages || 0, "message")}, at most ${sizeText(item.sent_max)} from one rank`,
    item.live && `${sizeText(item.live)} alive on the fullest rank`, item.flops && flopText(item.flops)].filter(Boolean);
  byId("node").replaceChildren(
    make("h3", {}, item.name, make("span", { class: "badge", kind: item.kind }, item.op),
      make("span", { class: "muted small" }, KIND_NAMES[item.kind])),
    make("p", {}, layout), haloText(item) ? make("p", {}, `halo before + after: ${haloText(item)}`) : "",
    item.overlapped ? make("p", {}, "travels while the first reader computes what needs no halo") : "",
    make("p", { class: "muted" }, figures.join("; ")), links("reads", item.reads || []), links("read by", item.readBy));
}

function buildNetwork() {
  buildRows();
  byId("kinds").append(...CHOICES.map(([key, title]) => make("button", { type: "button", "aria-pressed": String(key === "all"),
    click: (event) => {
      filter.choice = key;
      for (const button of byId("kinds").children) button.setAttribute("aria-pressed", String(button === event.currentTarget));
      applyFilter();
    } }, title)));
  byId("filter").addEventListener("input", (event) => { filter.text = event.target.value; applyFilter(); });
  byId("list").addEventListener("keydown", moveWithKeys);
  applyFilter();
  state.listeners.push(showChosen);
}
