// The heading, the controls of the drawing, and the start.
function buildHeading() {
  byId("title").textContent = data.name;
  const extents = (value) => `${value.name} ${value.shape.join("\u00d7")}`;
  byId("subtitle").textContent = `${data.inputs.map(extents).join(", ")} \u2192 ${data.outputs.map(extents).join(", ")}`;
  const totals = data.totals;
  const mesh = data.mesh.map(([name, count]) => `${name}=${count}`).join(", ") || "single";
  const cards = [["Mesh", mesh, plural(data.ranks, "rank")],
    ["Peak memory", sizeText(totals.peak_bytes_max), `fullest rank; ${sizeText(totals.peak_bytes_lockstep)} all in one process`],
    ["Weights", sizeText(totals.weight_bytes), "on every rank"],
    ["On the wire", sizeText(totals.sent_bytes), "all ranks together"],
    ["Messages", countText(totals.messages), "all ranks together"], ["Work", flopText(totals.flops), "all ranks together"]];
  if (data.schedule) {
    const thick = [...new Set(data.schedule.thickness)].sort((a, b) => a - b).join(" or ");
    const files = data.schedule.files.length ? `; in files: ${data.schedule.files.join(", ")}` : "";
    const counts = new Map(data.mesh);
    const cut = data.schedule.strips.map((axis) => `${counts.get(axis)} along ${axis}`).join(" \u00d7 ");
    const strips = cut ? `; strips one after the other, ${cut}: ${flopText(totals.flops_twice)} near their cuts done by both sides` : "";
    cards.push(["Schedule", `depth-first along ${data.schedule.axis}`, `${plural(data.schedule.thickness.length, "chain")}, slabs of ${thick} cells${strips}${files}`]);
  }
  byId("totals").append(...cards.map(([name, figure, more]) => make("div", {}, make("dt", {}, name), make("dd", {}, figure, make("small", {}, more)))));
  const lines = data.remarks.map(remark);
  byId("remarks").append(...lines.slice(0, 3));
  if (lines.length > 3) byId("remarks").append(make("details", {}, make("summary", {}, `and ${lines.length - 3} more`), ...lines.slice(3)));
}

/** What is gathered or computed more than once, and what that costs. */
function remark(found) {
  const texts = {
    gather: () => [make("b", {}, "Gathered "), `${found.name} for ${found.users.join(", ")}: ${sizeText(found.sent)} on the wire`],
    fallback: () => [make("b", {}, "No rule "), `${found.name} (${found.op}) runs whole on every rank; ${sizeText(found.workspace)} there`],
    replicated: () => [make("b", {}, "Replicated "), `${found.name} (${found.op}) over ${found.axes.join(", ")}: ${found.copies} times, ${
      found.flops ? `${flopText(found.flops)} more than once` : "nothing to compute"}`],
  };
  return make("p", { class: "remark", kind: found.kind }, ...texts[found.kind]());
}

function showItem(before, change) {
  const item = data.items[state.item];
  if (!view.scene || view.scene.item !== item) {
    view.scene = sceneOf(item);
    canvas.classList.toggle("flat", view.scene.flat);
    canvas.classList.toggle("line", view.scene.axes.length < 2);
    byId("volume-help").textContent = helpText();
  }
  byId("shown").replaceChildren(make("b", {}, item.name), ` ${KIND_NAMES[item.kind]}. `, ...describe());
  byId("legend").replaceChildren(...legend());
  canvas.setAttribute("aria-label", `Drawing of ${item.name}: ${byId("shown").textContent}`);
  byId("rank").value = state.rank;
  showRank();
  redraw();
}

function describe() {
  const { item, axes } = view.scene;
  if (!axes.length) return [`It has no spatial axes: [${data.layouts[item.layout].shape.join(", ")}].`];
  const at = coordinatesOf(state.rank);
  const text = (split) => {
    const part = split.parts[split.mesh === null ? 0 : at[split.mesh] || 0] || [];
    const ends = [];
    for (let i = 0; i < part.length; i += 2) ends.push(`${part[i]}:${part[i + 1]}`);
    return ends.join(" and ") || "nothing";
  };
  const own = axes.map((axis) => `${axis.name} ${text(axis.owned)}`).join(", ");
  const need = axes.filter((axis) => text(axis.owned) !== text(axis.needed)).map((axis) => `${axis.name} ${text(axis.needed)}`);
  return [`Rank ${state.rank} owns ${own}${need.length ? `; it needs ${need.join(", ")}` : ""}.`];
}

function legend() {
  const { axes, longest } = view.scene;
  const at = coordinatesOf(state.rank);
  const runs = axes.map((axis) => runsOf(axis, at, longest));
  const entry = (colour, text) => {
    const swatch = make("i");
    swatch.style.background = colour;
    return make("li", {}, swatch, text);
  };
  const found = axes.length ? [entry("var(--kind-input)", `shard of rank ${state.rank}`)] : [];
  if (found.length) view.swatch = found[0].firstChild;
  if (runs.some((list) => list.some((run) => run.needed && !run.owned))) {
    found.push(entry("var(--halo)", runs.some((list) => list.some((run) => run.widened)) ? "its halo (drawn wider than it is)" : "its halo"));
  }
  const blocks = axes.map((axis) => Math.max(1, ...axis.grid.map((g) => g.count)));
  if (blocks.some((n) => n > 1)) found.push(make("li", {}, `blocks of ${blocks.join("\u00d7")} shards`));
  return found;
}

function helpText() {
  return view.scene.flat ? "Click a shard to choose its rank; with the keys: arrows go to the neighbour, + and \u2212 change the size."
    : "Drag to turn, click a shard to choose its rank; with the keys: arrows turn, [ and ] change the rank, + and \u2212 the size, 0 resets.";
}

function showRank() {
  const per = data.per_rank;
  const figures = [["at", placeText(state.rank)]];
  if (per.peak) {
    figures.push(["peak memory", sizeText(per.peak[state.rank])], ["sent", sizeText(per.sent[state.rank])],
      ["received", sizeText(per.received[state.rank])], ["messages", countText(per.messages[state.rank])], ["work", flopText(per.flops[state.rank])]);
  }
  byId("rank-figures").replaceChildren(...figures.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text))));
}

/** Draw at the next frame, once however often it is asked for. */
function redraw() {
  if (view.waiting) return;
  view.waiting = requestAnimationFrame(() => { view.waiting = 0; draw(); });
}

function turn(yaw, pitch) {
  view.yaw += yaw;
  view.pitch = Math.max(-1.45, Math.min(1.45, view.pitch + pitch));
  redraw();
}

function resize(factor) {
  view.zoom = Math.max(0.4, Math.min(4, view.zoom * factor));
  redraw();
}

const stepRank = (by) => choose({ rank: (state.rank + by + data.ranks) % data.ranks });

function reset() {
  Object.assign(view, { yaw: -0.62, pitch: 0.42, zoom: 1, gap: 0.14, others: 0.34 });
  byId("gap").value = 14;
  byId("others").value = 34;
  redraw();
}

/** In a flat drawing the arrows go to the neighbour. */
function arrow(dx, dy) {
  if (!view.scene.flat) { turn(dx * 0.12, dy * 0.12); return; }
  const axes = view.scene.axes;
  const axis = dy && axes.length > 1 ? axes[0] : axes[axes.length - 1];
  if (!axis || axis.owned.mesh === null || (dy && axes.length < 2)) return;
  const at = coordinatesOf(state.rank);
  at[axis.owned.mesh] = Math.max(0, Math.min(axis.owned.parts.length - 1, at[axis.owned.mesh] + (dx || dy)));
  choose({ rank: rankAt(at) });
}

function listenToDrawing() {
  const keys = { ArrowLeft: () => arrow(-1, 0), ArrowRight: () => arrow(1, 0), ArrowUp: () => arrow(0, -1), ArrowDown: () => arrow(0, 1),
    "[": () => stepRank(-1), "]": () => stepRank(1), "+": () => resize(1.15), "=": () => resize(1.15), "-": () => resize(1 / 1.15), 0: reset };
  canvas.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  let last = null, moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    last = [event.clientX, event.clientY];
    moved = 0;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const [dx, dy] = [event.clientX - last[0], event.clientY - last[1]];
    moved += Math.abs(dx) + Math.abs(dy);
    last = [event.clientX, event.clientY];
    if (!view.scene.flat) turn(dx * 0.009, dy * 0.009);
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => {
    if (last && moved < 5 && name === "pointerup") {
      const frame = canvas.getBoundingClientRect();
      pick(event.clientX - frame.left, event.clientY - frame.top);
    }
    last = null;
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    resize(Math.exp(-event.deltaY * 0.01));
  }, { passive: false });
}

function listenToControls() {
  byId("rank").max = data.ranks - 1;
  byId("rank").addEventListener("change", (event) => {
    const rank = Math.round(Number(event.target.value)) || 0;
    choose({ rank: Math.max(0, Math.min(data.ranks - 1, rank)), force: true });
  });
  byId("rank-before").addEventListener("click", () => stepRank(-1));
  byId("rank-after").addEventListener("click", () => stepRank(1));
  byId("gap").addEventListener("input", (event) => { view.gap = event.target.value / 100; redraw(); });
  byId("others").addEventListener("input", (event) => { view.others = event.target.value / 100; redraw(); });
  byId("reset").addEventListener("click", reset);
  new ResizeObserver(redraw).observe(canvas);
}

/** Light, dark, or as the system has it. */
function listenToTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const names = ["Auto", "Light", "Dark"];
  let chosen = 0;
  const apply = () => {
    document.documentElement.dataset.theme = chosen === 2 || (chosen === 0 && dark.matches) ? "dark" : "light";
    byId("theme").textContent = names[chosen];
    byId("theme").setAttribute("aria-label", `Colours: ${["as the system has them", "light", "dark"][chosen]}`);
    redraw();
  };
  byId("theme").addEventListener("click", () => { chosen = (chosen + 1) % 3; apply(); });
  dark.addEventListener("change", apply);
  apply();
}

function start() {
  const halo = data.items.findIndex((item) => item.kind === "halo");
  const first = halo >= 0 ? halo : 0;
  const spread = data.mesh.map(([name, count]) => [name, Math.floor(count / 2)]);
  buildHeading();
  buildNetwork();
  buildMemory();
  buildTraffic();
  buildRanks();
  buildAlternatives();
  listenToTheme();
  listenToDrawing();
  listenToControls();
  state.listeners.push(showItem);
  const rank = memory && memory.ranks.length ? memory.largest : rankAt(Object.fromEntries(spread));
  choose({ item: first, rank, force: true });
}

start();
