// Memory over the steps, bytes per layer, and the tables of ranks and alternatives.
const memory = data.memory;
const chart = { width: 0, height: 250, left: 66, right: 12, top: 10, bottom: 26, series: null };

function niceStep(most) {
  const rough = Math.max(1, most) / 4;
  const unit = 2 ** Math.floor(Math.log2(rough));
  return rough / unit > 1.5 ? unit * 2 : unit;
}

const xOf = (step) => chart.left + ((step + 0.5) / memory.most.length) * (chart.width - chart.left - chart.right);
const yOf = (bytes) => chart.height - chart.bottom - (bytes / chart.top_bytes) * (chart.height - chart.top - chart.bottom);

/** A line that stays level through each step. */
function stairs(values) {
  const half = (chart.width - chart.left - chart.right) / values.length / 2;
  return values.map((v, i) => `${i ? "L" : "M"}${(xOf(i) - half).toFixed(1)} ${yOf(v).toFixed(1)}H${(xOf(i) + half).toFixed(1)}`).join("");
}

function drawMemory() {
  if (memory === null) return;
  const place = byId("memory");
  chart.width = place.clientWidth;
  if (!chart.width) return;
  const rank = Number(byId("memory-rank").value);
  const values = chart.series = memory.live[memory.ranks.indexOf(rank)];
  const step = niceStep(Math.max(1, ...memory.most));
  chart.top_bytes = Math.ceil(Math.max(1, ...memory.most) / step) * step;
  const [x0, x1, floor] = [chart.left, chart.width - chart.right, yOf(0)];
  const svg = make("svg:svg", { role: "img", "aria-label": byId("memory-text").textContent });
  for (let bytes = 0; bytes <= chart.top_bytes; bytes += step) {
    svg.append(make("svg:line", { class: "grid", x1: x0, x2: x1, y1: yOf(bytes), y2: yOf(bytes) }),
      make("svg:text", { x: x0 - 8, y: yOf(bytes) + 4, "text-anchor": "end" }, sizeText(bytes)));
  }
  if (data.ranks > 1) {
    const back = memory.least.map((v, i) => [i, v]).reverse();
    const half = (x1 - x0) / values.length / 2;
    svg.append(make("svg:path", { class: "band", d: `${stairs(memory.most)}${
      back.map(([i, v]) => `L${(xOf(i) + half).toFixed(1)} ${yOf(v).toFixed(1)}H${(xOf(i) - half).toFixed(1)}`).join("")}Z` }));
    svg.append(make("svg:path", { class: "limit", d: stairs(memory.most) }));
  }
  svg.append(make("svg:path", { class: "area", d: `${stairs(values)}L${x1} ${floor}L${x0} ${floor}Z` }),
    make("svg:path", { class: "curve", d: stairs(values) }));
  values.forEach((_, i) => {
    const item = data.items[inputCount + i];
    if (!COMMUNICATES.has(item.kind)) return;
    const tick = make("svg:line", { x1: xOf(i), x2: xOf(i), y1: floor + 3, y2: floor + 9, "stroke-width": 2 });
    tick.style.stroke = `var(--kind-${item.kind})`;
    svg.append(tick);
  });
  svg.append(make("svg:text", { x: x0, y: chart.height - 3 }, "first step"),
    make("svg:text", { x: x1, y: chart.height - 3, "text-anchor": "end" }, "last step"));
  chart.cursor = make("svg:line", { class: "cursor", y1: chart.top, y2: floor });
  chart.dot = make("svg:circle", { class: "dot", r: 4.5 });
  svg.append(chart.cursor, chart.dot);
  chart.tip = make("div", { class: "tip", hidden: "" });
  place.replaceChildren(svg, chart.tip);
  svg.addEventListener("pointermove", (event) => hoverMemory(stepAt(event), true));
  svg.addEventListener("pointerleave", () => { chart.tip.hidden = true; markStep(); });
  svg.addEventListener("click", (event) => choose({ item: inputCount + stepAt(event) }));
  markStep();
}

function stepAt(event) {
  const x = event.clientX - byId("memory").getBoundingClientRect().left;
  const count = memory.most.length;
  return Math.max(0, Math.min(count - 1, Math.floor(((x - chart.left) / (chart.width - chart.left - chart.right)) * count)));
}

function hoverMemory(step, tip) {
  const x = xOf(step);
  for (const [key, value] of [["x1", x], ["x2", x]]) chart.cursor.setAttribute(key, value);
  chart.dot.setAttribute("cx", x);
  chart.dot.setAttribute("cy", yOf(chart.series[step]));
  if (!tip) return;
  const item = data.items[inputCount + step];
  chart.tip.hidden = false;
  chart.tip.replaceChildren(make("b", {}, item.name), make("br"), `${item.op}: ${sizeText(chart.series[step])}`);
  const side = x > chart.width / 2;
  chart.tip.style.left = side ? "auto" : `${x + 12}px`;
  chart.tip.style.right = side ? `${chart.width - x + 12}px` : "auto";
}

/** Put the cursor on the chosen node. */
function markStep() {
  const step = state.item - inputCount;
  if (memory === null || !chart.series) return;
  hoverMemory(Math.max(0, step), false);
  for (const mark of [chart.cursor, chart.dot]) mark.style.visibility = step < 0 ? "hidden" : "visible";
  const slider = byId("step");
  slider.value = Math.max(0, step);
  const text = step < 0 ? "The input, before the first step" : `Step ${step + 1} of ${chart.series.length}, ${
    data.items[state.item].name}: ${sizeText(chart.series[step])} on rank ${byId("memory-rank").value}`;
  slider.setAttribute("aria-valuetext", text);
  byId("step-text").textContent = text;
}

function buildMemory() {
  if (memory === null || !memory.most.length) {
    byId("memory-text").textContent = memory === null
      ? "This plan is executed depth-first: slabs go through many layers at once, so that memory belongs to the run, not to a node. "
        + "The bars show the most that each rank holds at any time." : "Nothing is computed.";
    for (const id of ["memory-choice", "scrub", "step-text"]) byId(id).hidden = true;
    byId("memory").replaceChildren();
    byId("memory").classList.remove("chart");
    if (memory === null && data.per_rank.peak) slabBars();
    return;
  }
  const all = memory.ranks.length === data.ranks;
  byId("memory-text").textContent = `Activations alive, workspace included, weights not (${sizeText(data.totals.weight_bytes)} on every rank). `
    + (data.ranks > 1 ? "The shaded band lies between the least and the most of all ranks; " : "")
    + `marks below are communication.${all ? "" : " Of many ranks these can be chosen: the first, the middle, the last, and those with the most and the least."}`;
  byId("memory-rank").append(...memory.ranks.map((rank) =>
    make("option", { value: rank }, `${rank} (${placeText(rank)})${rank === memory.largest ? ", largest" : ""}`)));
  byId("memory-rank").value = memory.largest;
  byId("memory-rank").addEventListener("change", (event) => { drawMemory(); choose({ rank: Number(event.target.value) }); });
  byId("step").max = memory.most.length - 1;
  byId("step").addEventListener("input", (event) => choose({ item: inputCount + Number(event.target.value) }));
  state.listeners.push((before) => {
    if (before.rank !== state.rank && memory.ranks.includes(state.rank)) {
      byId("memory-rank").value = state.rank;
      drawMemory();
    } else markStep();
  });
  new ResizeObserver(drawMemory).observe(byId("memory"));
}

function slabBars() {
  const most = Math.max(1, ...data.per_rank.peak);
  const shown = [...data.per_rank.peak.keys()].sort((a, b) => data.per_rank.peak[b] - data.per_rank.peak[a]).slice(0, 32).sort((a, b) => a - b);
  byId("memory").append(make("ol", { class: "bars" }, ...shown.map((rank) => make("li", {}, make("button",
    { type: "button", kind: "input", click: () => choose({ rank }) }, make("span", {}, `rank ${rank} (${placeText(rank)})`),
    make("b", { part: `${(100 * data.per_rank.peak[rank]) / most}%` }), make("em", {}, sizeText(data.per_rank.peak[rank])))))));
}

function buildTraffic() {
  const senders = data.items.filter((item) => item.sent);
  const shown = [...senders].sort((a, b) => b.sent - a.sent).slice(0, 40).sort((a, b) => a.number - b.number);
  const rest = senders.length - shown.length;
  byId("traffic-text").textContent = !senders.length ? "Nothing is sent."
    : `${sizeText(data.totals.sent_bytes)} in ${plural(data.totals.messages, "message")}, all ranks together.${
      rest > 0 ? ` The ${shown.length} largest of ${senders.length} are shown, in the network's order.` : ""}`;
  const most = Math.max(1, ...shown.map((item) => item.sent));
  const buttons = new Map(shown.map((item) => [item.number, make("button", { type: "button", kind: item.kind,
    title: `${item.name}: ${KIND_NAMES[item.kind]}, ${plural(item.messages || 0, "message")}`, click: () => choose({ item: item.number }) },
    make("span", {}, item.name), make("b", { part: `${(100 * item.sent) / most}%` }), make("em", {}, sizeText(item.sent)))]));
  byId("traffic").append(...[...buttons.values()].map((button) => make("li", {}, button)));
  state.listeners.push(() => {
    for (const [number, button] of buttons) {
      if (number === state.item) button.setAttribute("aria-current", "true"); else button.removeAttribute("aria-current");
    }
  });
}

function headed(table, titles, body) {
  table.append(make("thead", {}, make("tr", {}, ...titles.map((title, i) => make("th", { scope: "col", class: i ? "" : "text" }, title)))),
    make("tbody", {}, ...body));
}

function buildRanks() {
  const per = data.per_rank;
  if (!per.peak || data.ranks === 1) { byId("ranks-card").hidden = true; return; }
  const keys = ["peak", "sent", "received", "messages", "flops"];
  const texts = [sizeText, sizeText, sizeText, countText, countText];
  const figures = (of) => keys.map((key, i) => make("td", {}, texts[i](of(per[key]))));
  if (data.ranks <= 64) {
    const lines = per.peak.map((_, rank) => make("tr", {}, make("td", { class: "text" },
      make("button", { type: "button", click: () => choose({ rank }) }, `${rank}`), ` ${placeText(rank)}`), ...figures((list) => list[rank])));
    headed(byId("ranks"), ["rank", "peak", "sent", "received", "messages", "FLOP"], lines);
    state.listeners.push(() => lines.forEach((line, rank) => {
      if (rank === state.rank) line.setAttribute("aria-current", "true"); else line.removeAttribute("aria-current");
    }));
    return;
  }
  byId("ranks-text").textContent = `Least, median and most of ${data.ranks} ranks, each figure by itself; a rank's own stand beside the drawing.`;
  const sorted = Object.fromEntries(keys.map((key) => [key, [...per[key]].sort((a, b) => a - b)]));
  headed(byId("ranks"), ["", "peak", "sent", "received", "messages", "FLOP"], [["least", 0], ["median", data.ranks >> 1], ["most", data.ranks - 1]]
    .map(([name, place]) => make("tr", {}, make("td", { class: "text" }, name), ...keys.map((key, i) => make("td", {}, texts[i](sorted[key][place]))))));
}

function buildAlternatives() {
  if (!data.alternatives.length && !data.explain) return;
  byId("alternatives-card").hidden = false;
  byId("explain").append(...data.explain.split(/\n\s*\n/).filter(Boolean).map((text) => make("p", {}, text)));
  if (!data.alternatives.length) { byId("alternatives").parentElement.hidden = true; return; }
  const own = (key, text) => (a) => make("td", {}, a[key] === undefined || a[key] === null ? "" : text(a[key]));
  const seconds = (s) => (s < 0.1 ? `${(1000 * s).toPrecision(3)} ms` : `${s.toPrecision(3)} s`);
  const columns = [["mesh", (a) => make("td", { class: "text" }, a.mesh, a.chosen ? make("b", {}, " (this one)") : "")],
    ["time", own("seconds", seconds)], ["peak", own("peak_bytes", sizeText)], ["sent", own("sent_bytes", sizeText)],
    ["messages", own("messages", countText)], ["", (a) => make("td", { class: "text" }, a.note || "")]];
  headed(byId("alternatives"), columns.map(([title]) => title), data.alternatives.map((a) =>
    make("tr", { "aria-current": a.chosen ? "true" : null }, ...columns.map(([, cell]) => cell(a)))));
}
