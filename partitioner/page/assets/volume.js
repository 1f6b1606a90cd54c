// The drawing: the shards of the chosen value as boxes, the chosen rank's shard and its halo.
// The projection is parallel and boxes are cut by planes along the axes, so going through them from far to near
// along each axis in turn paints them in the right order.
const MOST_BOXES = 512;    // above it, neighbouring shards are drawn as one block
const MARGIN = 84;         // pixels for the names of axes
const THINNEST = 0.022;    // a halo is drawn at least this wide, in parts of the longest axis

const view = { yaw: -0.62, pitch: 0.42, zoom: 1, gap: 0.14, others: 0.34, polygons: [], dragged: false };
const canvas = byId("volume");

/** The intervals that every coordinate holds along an axis: [[start, stop, ...], ...], and the mesh axis. */
function splitOf(layout, axis) {
  const number = layout.axes[axis];
  if (number === null) return { mesh: null, parts: [[0, layout.shape[axis]]] };
  const table = data.axes[number];
  if (table.expanded === undefined) {
    table.expanded = table.parts || table.cuts.slice(1).map((stop, i) => (stop > table.cuts[i] ? [table.cuts[i], stop] : []));
  }
  return { mesh: table.mesh, parts: table.expanded };
}

/** What is drawn of an item: for each of up to three axes its extent, who owns and who needs what. */
function sceneOf(item) {
  const needed = data.layouts[item.layout];
  const owned = item.owned === undefined ? needed : data.layouts[item.owned];
  const base = owned.drawn.length >= needed.drawn.length ? owned : needed;
  const axes = base.drawn.map((axis, i) => ({
    axis, name: base.names[i], extent: owned.shape[axis], owned: splitOf(owned, axis), needed: splitOf(needed, axis),
  }));
  for (const axis of axes) axis.grid = gridOf(axis);
  const longest = Math.max(1, ...axes.map((a) => a.extent));
  for (const axis of axes) axis.scale = Math.max(0.12, axis.extent / longest) / Math.max(1, axis.extent);
  mergeBlocks(axes);
  return { item, axes, longest, flat: axes.length < 3 };
}

/** Disjoint intervals, one per coordinate that holds anything; what overlaps is cut where the next one begins. */
function gridOf(axis) {
  const parts = axis.owned.parts;
  const held = parts.map((part, i) => ({ coordinate: i, from: part[0], to: part[part.length - 1] }))
    .filter((part) => part.from !== undefined);
  return held.map((part, i) => ({ ...part, first: part.coordinate, count: 1,
    to: Math.max(part.from, Math.min(part.to, i + 1 < held.length ? Math.max(part.from, held[i + 1].from) : part.to)) }));
}

function mergeBlocks(axes) {
  const total = () => axes.reduce((product, axis) => product * axis.grid.length, 1);
  while (total() > MOST_BOXES) {
    const axis = axes.reduce((most, a) => (a.grid.length > most.grid.length ? a : most));
    const merged = [];
    for (let i = 0; i < axis.grid.length; i += 2) {
      const [a, b] = [axis.grid[i], axis.grid[i + 1]];
      merged.push(b ? { ...a, to: b.to, count: a.count + b.count } : a);
    }
    axis.grid = merged;
  }
}

/** The chosen rank's cells along an axis: runs that it owns, needs, or both; narrow halos are widened to be seen. */
function runsOf(axis, at, longest) {
  const pick = (split) => split.parts[split.mesh === null ? 0 : at[split.mesh] || 0] || [];
  const owned = pick(axis.owned), needed = pick(axis.needed);
  const ends = [...new Set([...owned, ...needed])].sort((a, b) => a - b);
  const inside = (part, cell) => part.some((start, i) => i % 2 === 0 && start <= cell && cell < part[i + 1]);
  const runs = [];
  for (let i = 0; i + 1 < ends.length; i += 1) {
    const run = { from: ends[i], to: ends[i + 1], owned: inside(owned, ends[i]), needed: inside(needed, ends[i]) };
    if (run.owned || run.needed) runs.push(run);
  }
  const least = Math.min(THINNEST * longest, 0.3 * runs.reduce((sum, run) => sum + (run.owned ? run.to - run.from : 0), 0));
  const own = runs.findIndex((run) => run.owned);
  runs.forEach((run, i) => {
    if (run.owned || run.to - run.from >= least) return;
    run.widened = true;
    if (own >= 0 && i < own) run.from = run.to - least; else run.to = run.from + least;
  });
  return runs;
}

/** Vectors of the three axes on the screen and into it; drawn axes are the last of depth, height and width. */
function projection(scene) {
  const [cy, sy, cp, sp] = [Math.cos(view.yaw), Math.sin(view.yaw), Math.cos(view.pitch), Math.sin(view.pitch)];
  if (scene.flat) return [[0, 0, 1], [0, 1, 0], [1, 0, 0]];
  return [[sy, -cy * sp, cy * cp], [0, cp, sp], [cy, sy * sp, -sy * cp]];
}

function colourOf(grid, index, dark) {
  const [i, j, k] = index;
  const [a, b, c] = grid.map((g) => Math.max(1, g.length - 1));
  const hue = 205 + 130 * (i / a) - 55 * (j / b);
  const light = (dark ? 56 : 60) + 9 * (k / c) + ((i + j + k) % 2 ? 5 : -3);
  return [hue, 62, light];
}

const css = ([hue, saturation, light]) => `hsl(${hue} ${saturation}% ${light}%)`;

function draw() {
  const scene = view.scene;
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width || !scene) return;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  view.polygons = [];
  if (scene.axes.length === 0) return;
  const padded = [...Array(3 - scene.axes.length).fill(null), ...scene.axes];
  paint(pen, scene, padded, width, height);
}

function paint(pen, scene, padded, width, height) {
  const dark = document.documentElement.dataset.theme === "dark";
  const style = getComputedStyle(document.documentElement);
  const [halo, edge, muted] = ["--halo", "--edge", "--muted"].map((name) => style.getPropertyValue(name).trim());
  const vectors = projection(scene);
  const grid = padded.map((axis) => (axis ? axis.grid : [{ from: 0, to: 0.16, first: 0, count: 1 }]));
  const scale = padded.map((axis) => (axis ? axis.scale : 1));
  const gapOf = padded.map((axis, i) => (axis ? (view.gap * 0.9) / Math.max(3, grid[i].length) : 0));
  const span = padded.map((axis, i) => (axis ? axis.extent * scale[i] + gapOf[i] * (grid[i].length - 1) : (scene.axes.length === 1 ? 0.16 : 0)));
  const reach = scene.flat ? 0 : Math.hypot(...span);
  const zoom = view.zoom * (scene.flat
    ? Math.min((width - 2 * MARGIN) / span[2], (height - 60) / span[1])
    : (1.2 * Math.min(width - 1.25 * MARGIN, height - 40)) / reach);
  const point = (p) => {
    let [x, y] = [width / 2, height / 2 - (scene.flat ? 10 : 4)];
    for (let i = 0; i < 3; i += 1) {
      x += vectors[i][0] * (p[i] - span[i] / 2) * zoom;
      y += vectors[i][1] * (p[i] - span[i] / 2) * zoom;
    }
    return [x, y];
  };
  const at = coordinatesOf(state.rank);
  const box = (low, high, colour, alpha, stroke, index, line = 1) => {
    for (let a = 0; a < 3; a += 1) {
      if (Math.abs(vectors[a][2]) < 1e-9 || (scene.flat && a !== 0)) continue;
      const [b, c] = [(a + 1) % 3, (a + 2) % 3];
      const side = vectors[a][2] > 0 ? low[a] : high[a];
      const corner = (u, v) => { const p = []; p[a] = side; p[b] = u; p[c] = v; return point(p); };
      const polygon = [corner(low[b], low[c]), corner(high[b], low[c]), corner(high[b], high[c]), corner(low[b], high[c])];
      pen.beginPath();
      polygon.forEach(([x, y], n) => (n ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      pen.closePath();
      const shade = [0, 7, -7][a] * (dark ? -0.8 : 1);
      pen.globalAlpha = alpha;
      pen.fillStyle = typeof colour === "string" ? colour : `hsl(${colour[0]} ${colour[1]}% ${colour[2] - shade}%)`;
      pen.fill();
      if (stroke) {
        pen.globalAlpha = Math.min(1, alpha * 1.6 + 0.08);
        pen.strokeStyle = stroke;
        pen.lineWidth = line;
        pen.stroke();
      }
      pen.globalAlpha = 1;
      if (index) view.polygons.push({ polygon, index });
    }
  };
  const order = (list, a) => (vectors[a][2] > 0 ? [...list.keys()].reverse() : [...list.keys()]);
  const place = (a, g, cell) => cell * scale[a] + gapOf[a] * g;
  const mine = padded.map((axis, a) => (axis === null || axis.owned.mesh === null ? 0
    : grid[a].findIndex((g) => g.first <= at[axis.owned.mesh] && at[axis.owned.mesh] < g.first + g.count)));
  for (const i of order(grid[0], 0)) for (const j of order(grid[1], 1)) for (const k of order(grid[2], 2)) {
    const index = [i, j, k], cells = index.map((g, a) => grid[a][g]);
    box(cells.map((g, a) => place(a, index[a], g.from)), cells.map((g, a) => place(a, index[a], g.to)),
      colourOf(grid, index, dark), view.others, edge, index, 0.6);
  }
  const runs = padded.map((axis) => (axis ? runsOf(axis, at, scene.longest) : [{ from: 0, to: 0.16, owned: true, needed: true }]));
  const base = mine.map((g) => Math.max(0, g));
  if (view.swatch) view.swatch.style.background = css(colourOf(grid, base, dark));
  for (const i of order(runs[0], 0)) for (const j of order(runs[1], 1)) for (const k of order(runs[2], 2)) {
    const cells = [runs[0][i], runs[1][j], runs[2][k]];
    const owned = cells.every((c) => c.owned), needed = cells.every((c) => c.needed);
    if (!owned && !needed) continue;
    const ends = (which) => cells.map((c, a) => (padded[a] ? place(a, base[a], c[which]) : c[which]));
    box(ends("from"), ends("to"), owned ? colourOf(grid, base, dark) : halo, owned ? 1 : 0.62, edge, null, owned ? 1.3 : 0.7);
  }
  label(pen, scene, padded, span, point, vectors, muted);
}

/** The name and extent of each axis, beside the edge of the volume that lies furthest out. */
function label(pen, scene, padded, span, point, vectors, colour) {
  pen.fillStyle = colour;
  pen.font = "12px system-ui, sans-serif";
  pen.textBaseline = "middle";
  padded.forEach((axis, a) => {
    if (axis === null) return;
    const [b, c] = [(a + 1) % 3, (a + 2) % 3];
    const edges = [];
    for (const u of [0, span[b]]) for (const v of [0, span[c]]) {
      const p = []; p[a] = span[a] / 2; p[b] = u; p[c] = v;
      edges.push(point(p));
    }
    const middle = point(span.map((s) => s / 2));
    const steep = Math.abs(vectors[a][1]) > Math.abs(vectors[a][0]);
    const [x, y] = edges.reduce((best, e) => ((steep ? best[0] - e[0] : e[1] - best[1]) > 0 ? e : best));
    pen.textAlign = steep ? "right" : x < middle[0] - 4 ? "right" : x > middle[0] + 4 ? "left" : "center";
    const text = `${axis.name} ${axis.extent}`;
    const [dx, dy] = steep ? [-9, 0] : [x < middle[0] - 4 ? -4 : x > middle[0] + 4 ? 4 : 0, 14];
    const half = pen.measureText(text).width;
    const left = pen.textAlign === "right" ? half : pen.textAlign === "center" ? half / 2 : 0;
    const most = canvas.clientWidth - 4 - (half - left);
    pen.fillText(text, Math.min(most, Math.max(left + 4, x + dx)), Math.min(canvas.clientHeight - 10, y + dy));
  });
}

/** Choose the shard under a point of the drawing. */
function pick(x, y) {
  const inside = (polygon) => polygon.reduce((odd, [ax, ay], i) => {
    const [bx, by] = polygon[(i + 1) % polygon.length];
    return (ay > y) !== (by > y) && x < ax + ((y - ay) / (by - ay)) * (bx - ax) ? !odd : odd;
  }, false);
  const hit = view.polygons.findLast((p) => inside(p.polygon));
  if (!hit) return;
  const at = coordinatesOf(state.rank);
  const axes = view.scene.axes;
  axes.forEach((axis, i) => {
    if (axis.owned.mesh !== null) at[axis.owned.mesh] = axis.grid[hit.index[3 - axes.length + i]].first;
  });
  choose({ rank: rankAt(at) });
}
