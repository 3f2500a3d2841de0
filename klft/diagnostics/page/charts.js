/* The charts: plain SVG, drawn to the width there is, again when that changes. Orange is reverse, blue is forward. */

const HIGH = 270, LEFT = 54, RIGHT = 14, UPPER = 12, LOWER = 40;

function linearTicks(low, high, wanted) {
  const raw = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(k => k * power).find(s => s >= raw * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k++) ticks.push(Number((k * step).toPrecision(12)));
  return ticks;
}
function logTicks(low, high, wanted) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9), ticks = [];
  const step = Math.max(1, Math.ceil((last - first + 1) / wanted));
  for (let e = last; e >= first; e -= step) ticks.unshift(10 ** e);
  return ticks;
}
function tickText(v, log) {
  if (!log || (v >= 0.001 && v < 1e5)) return nats(v);
  return `10${superscript(Math.round(Math.log10(v)))}`;
}

/* An axis maps values to pixels: {low, high, log, name, text}. */
function scaleOf(axis, from, to) {
  const f = axis.log ? Math.log10 : v => v, a = f(axis.low), b = f(axis.high);
  return v => from + ((to - from) * (f(axis.log ? Math.max(v, axis.low) : v) - a)) / (b - a || 1);
}

function frame(width, height, x, y, label) {
  const svg = make("svg", { role: "img", "aria-label": label, width, height, viewBox: `0 0 ${width} ${height}` });
  const X = scaleOf(x, LEFT, width - RIGHT), Y = scaleOf(y, height - LOWER, UPPER), middle = (height - LOWER + UPPER) / 2;
  const ticks = (axis, n) => (axis.log ? logTicks : linearTicks)(axis.low, axis.high, n);
  for (const v of ticks(y, y.log ? 8 : 5)) {
    svg.append(make("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: Y(v), y2: Y(v) }),
      make("text", { x: LEFT - 6, y: Y(v) + 4, "text-anchor": "end" }, (y.text ?? tickText)(v, y.log)));
  }
  for (const v of ticks(x, width < 420 ? 5 : 8)) {
    svg.append(make("line", { class: "axis", x1: X(v), x2: X(v), y1: height - LOWER, y2: height - LOWER + 4 }),
      make("text", { x: X(v), y: height - LOWER + 17, "text-anchor": "middle" }, (x.text ?? tickText)(v, x.log)));
  }
  svg.append(make("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: height - LOWER, y2: height - LOWER }),
    make("text", { x: (LEFT + width - RIGHT) / 2, y: height - 5, "text-anchor": "middle" }, x.name),
    make("text", { "text-anchor": "middle", transform: `translate(12 ${middle}) rotate(-90)` }, y.name));
  return { svg, X, Y, width, height };
}

/* Draws now and whenever the width changes; hands back nothing. */
function drawn(id, draw) {
  const host = byId(id);
  if (!host) return;
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(host.clientWidth);
    if (width && width !== last) draw(host, (last = width));
  }).observe(host);
  const width = Math.floor(host.clientWidth);
  if (width) draw(host, (last = width));
}

const pathOf = points => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
const rowsWith = (rows, key) => rows.filter(r => Number.isFinite(value(r[key])));
const highest = (rows, keys) => Math.max(1e-9, ...keys.flatMap(key => rowsWith(rows, key).map(r => value(r[key]))));

function curve(plot, rows, at, key, name) {
  const points = rowsWith(rows, key).map(r => [plot.X(at(r)), plot.Y(value(r[key]))]);
  plot.svg.append(make("path", { class: `line ${name}`, d: pathOf(points) }));
  if (points.length < 30) plot.svg.append(...points.map(([cx, cy]) => make("circle", { class: `point ${name}`, cx, cy, r: 3 })));
}

/* The numbers of the place nearest to the pointer: places are [x in pixels, text]. */
function hover(plot, places) {
  const { svg, width, height } = plot, line = make("line", { class: "hover", y1: UPPER, y2: height - LOWER });
  const text = make("text", { class: "hover", y: UPPER + 10 });
  svg.addEventListener("pointermove", event => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    const [x, said] = places.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const left = x < width / 2;
    for (const end of ["x1", "x2"]) line.setAttribute(end, x);
    text.setAttribute("x", left ? LEFT + 8 : width - RIGHT - 4);
    text.setAttribute("text-anchor", left ? "start" : "end");
    text.textContent = said;
    svg.append(line, text);
  });
  svg.addEventListener("pointerleave", () => { line.remove(); text.remove(); });
}
const meansOf = r => ["reverse", "forward"].filter(side => r[`${side}_mean`] !== undefined)
  .map(side => `${side} ${nats(value(r[`${side}_mean`]), 3)}`).join(", ") + `, n ${count(r.count)}`;

function drawPositions(host, width) {
  const rows = data.positions, middle = r => (r.start + r.stop - 1) / 2;
  const keys = ["reverse_mean", "forward_mean", "reverse_p90", "forward_p90"];
  const high = highest(rows, keys), low = rows[0].start, last = rows.at(-1).stop - 1;
  const x = { low, high: Math.max(last, low + 1), name: "token position" };
  const what = "mean and 90th percentile of both directions";
  const most = Math.max(...rows.map(r => r.count / (r.stop - r.start)));
  const plot = frame(width, HIGH, x, { low: 0, high: high * 1.04, name: "nats per token" },
    `KL by token position, ${count(low)} to ${count(last)}: ${what}; highest value ${nats(high)} nats; grey: how many tokens, ${nats(most)} at most`);
  const heights = rows.map(r => [plot.X(middle(r)), plot.Y((high * r.count) / (r.stop - r.start) / most)]);
  const base = plot.Y(0), shape = [[heights[0][0], base], ...heights, [heights.at(-1)[0], base]];
  plot.svg.append(make("path", { class: "area n", d: `${pathOf(shape)}Z` }));
  for (const key of keys.reverse()) curve(plot, rows, middle, key, key.replace("_", " "));
  hover(plot, rows.map(r => [plot.X(middle(r)), `position ${count(r.start)}${r.stop - r.start > 1 ? ` to ${count(r.stop - 1)}` : ""}: ${meansOf(r)}`]));
  host.replaceChildren(plot.svg);
}

function drawHistogram(host, width) {
  const { least, per_decade: each, ...shares } = data.histograms, names = Object.keys(shares);
  const bars = Math.max(...names.map(name => shares[name].length)), at = i => least * 10 ** (i / each);
  const high = Math.max(...names.flatMap(name => shares[name]));
  const plot = frame(width, HIGH, { low: least, high: at(bars), log: true, name: "nats (logarithmic)" },
    { low: 0, high: high * 1.04, name: "share of tokens", text: v => `${nats(100 * v)} %` },
    `Histogram of both KLs, logarithmic from ${least} to ${nats(at(bars))} nats; highest bar ${percent(high)} of tokens`);
  const { svg, X, Y } = plot;
  for (const name of names) {
    const corners = shares[name].flatMap((share, i) => [[X(at(i)), Y(share)], [X(at(i + 1)), Y(share)]]);
    const outline = pathOf([[corners[0][0], Y(0)], ...corners, [corners.at(-1)[0], Y(0)]]);
    svg.append(make("path", { class: `area ${name}`, d: `${outline}Z` }), make("path", { class: `line ${name}`, d: outline }));
  }
  hover(plot, Array.from({ length: bars }, (_, i) => [X(at(i + 0.5)), `${nats(at(i), 2)} to ${nats(at(i + 1), 2)} nats: `
    + names.map(name => `${name} ${percent(shares[name][i] ?? 0)}`).join(", ")]));
  host.replaceChildren(svg);
}

function drawSteps(host, width) {
  const rows = data.steps, keys = ["reverse_mean", "forward_mean"], high = highest(rows, keys);
  const x = { low: rows[0].step, high: rows.at(-1).step, name: "training step" };
  const plot = frame(width, HIGH, x, { low: 0, high: high * 1.04, name: "nats per token" },
    `Mean KL by training step, ${x.low} to ${x.high}, both directions; highest mean ${nats(high)} nats`);
  for (const key of keys) curve(plot, rows, r => r.step, key, key.replace("_", " "));
  hover(plot, rows.map(r => [plot.X(r.step), `step ${count(r.step)}: ${meansOf(r)}`]));
  host.replaceChildren(plot.svg);
}

/* --- forward against reverse ------------------------------------------------------------------------------------- */

const POINTS = 4000, FLOOR = 1e-4, REACH = 14; // dots at most; the axes' ends; pixels from which a click finds a dot
const COLOUR_OF = { "mode-dropping": "forward", "mode-inventing": "reverse" };
const larger = at => Math.max(columns.reverse_kl[at], columns.forward_kl[at]);

/* The largest tokens all appear; of the rest every n-th, so that the cloud keeps its shape and the page its speed. */
function pointTokens() {
  const usable = [];
  for (let at = 0; at < total; at++) {
    if (!columns.prompt[at] && Number.isFinite(number("reverse_kl", at)) && Number.isFinite(number("forward_kl", at))
      && number("reverse_kl", at) !== null && number("forward_kl", at) !== null) usable.push(at);
  }
  if (usable.length <= POINTS) return { chosen: usable, all: usable.length };
  const half = POINTS / 2, sizes = Float32Array.from(usable, larger).sort(), least = sizes[sizes.length - half];
  const large = usable.filter(at => larger(at) >= least).slice(0, half), rest = usable.filter(at => larger(at) < least);
  const some = Array.from({ length: half }, (_, i) => rest[Math.floor((i * rest.length) / half)]);
  return { chosen: rest.length ? [...large, ...some] : large, all: usable.length };
}

/* Where one quadrant ends and the next begins, as pairs of points: see `quadrant` in stats.py. */
function borders({ quiet: a, much: m }, high) {
  const upper = [[FLOOR, a], [a / m, a], [a, a], [a / m, a], [high / m, high]], turn = ([x, y]) => [y, x];
  return [upper.slice(0, 3), upper.slice(3), upper.slice(0, 3).map(turn), upper.slice(3).map(turn)];
}

function drawScatter(host, width) {
  const { chosen, all } = pointTokens(), high = 1.5 * Math.max(1, ...chosen.map(larger));
  const height = Math.min(Math.max(Math.round(width * 0.78), 300), 560), axis = { low: FLOOR, high, log: true };
  const plot = frame(width, height, { ...axis, name: "reverse KL, nats" }, { ...axis, name: "forward KL, nats" },
    `Forward against reverse KL of ${count(chosen.length)} tokens, both logarithmic. Upper left: mode-dropping; `
    + "lower right: mode-inventing. The table of worst tokens below leads to the same tokens.");
  const { svg, X, Y } = plot;
  for (const line of borders(data.quadrants, high)) {
    svg.append(make("path", { class: "split", d: pathOf(line.map(([x, y]) => [X(x), Y(y)])) }));
  }
  const places = chosen.map(at => [X(columns.reverse_kl[at]), Y(columns.forward_kl[at])]);
  const marks = chosen.map((at, i) => {
    const [cx, cy] = places[i].map(v => v.toFixed(1)), kind = COLOUR_OF[data.quadrants.names[columns.quadrant[at]]] ?? "";
    return make("circle", { class: `point ${kind}`, cx, cy, r: kind ? 3.2 : 2.4, "data-at": at });
  });
  const left = { x: LEFT + 8 }, right = { x: width - RIGHT - 6, "text-anchor": "end" };
  const upper = { y: UPPER + 14 }, lower = { y: height - LOWER - 10 };
  svg.append(make("g", {}, ...marks),
    make("text", { class: "name forward", ...left, ...upper }, "mode-dropping"),
    make("text", { class: "name reverse", ...right, ...lower }, "mode-inventing"),
    make("text", { class: "name", ...left, ...lower }, "neither"),
    make("text", { class: "name", ...right, ...upper }, "both"));
  host.replaceChildren(svg);
  const fewer = ` Showing ${count(chosen.length)} of the ${count(all)} tokens above.`;
  byId("scatter-count").textContent = chosen.length < all ? fewer : "";
  listenToPoints(svg, chosen, places, marks);
}

/* The dot under the pointer is the nearest one: dots are too small to hit. */
function listenToPoints(svg, chosen, places, marks) {
  const nearest = event => {
    const box = svg.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, distance = REACH ** 2;
    places.forEach(([a, b], i) => {
      const d = (a - x) ** 2 + (b - y) ** 2;
      if (d < distance) [best, distance] = [i, d];
    });
    return best;
  };
  let near = -1;
  const said = make("text", { class: "hover", x: LEFT + 8, y: UPPER + 32 });
  svg.append(said);
  const mark = i => {
    marks[near]?.classList.remove("near");
    marks[(near = i)]?.classList.add("near");
    said.textContent = i < 0 ? "" : `“${textOf(columns.token[chosen[i]])}” reverse ${nats(columns.reverse_kl[chosen[i]], 3)}, forward ${nats(columns.forward_kl[chosen[i]], 3)}`;
  };
  svg.addEventListener("pointermove", event => mark(nearest(event)));
  svg.addEventListener("pointerleave", () => mark(-1));
  svg.addEventListener("click", event => {
    const i = nearest(event);
    if (i >= 0) focusToken(chosen[i], true);
  });
}
