/* The tokens: how a text is shown, the heatmap, its colours, the card, moving about by keyboard. */

const data = JSON.parse(document.getElementById("data").textContent), columns = {};
const darkness = matchMedia("(prefers-color-scheme: dark)");
const byId = id => document.getElementById(id);

/* An element with attributes and children. Strings become text nodes: nothing here ever parses HTML. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "text", "rect", "title"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/* The columns of the tokens: see `_pack` in report.py. */
async function unpack() {
  const text = atob(data.packed), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const kinds = { u1: Uint8Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };
  let at = 0;
  for (const [name, [kind, length]] of Object.entries(data.columns)) {
    const column = new kinds[kind](length), raw = new Uint8Array(column.buffer), size = column.BYTES_PER_ELEMENT;
    for (let k = 0; k < size; k++) for (let i = k; i < raw.length; i += size) raw[i] = planes[at++];
    columns[name] = column;
  }
}

/* --- numbers ----------------------------------------------------------------------------------------------------- */

/* JSON has no infinity: "Infinity", "-Infinity" and "NaN" come as strings. null is "not measured". */
const value = v => (v === null || v === undefined ? null : Number(v));
const minus = text => text.replace("-", "\u2212");
function nats(v, digits = 4) {
  if (v === null) return "–";
  if (!Number.isFinite(v)) return Number.isNaN(v) ? "NaN" : v > 0 ? "∞" : "−∞";
  const size = Math.abs(v);
  if (size !== 0 && size < 1e-3) return minus(v.toExponential(2).replace("e-", "e−"));
  return minus(Number(v.toPrecision(size < 1000 ? digits : 4)).toString());
}
const count = n => n.toLocaleString("en");
function percent(p) {
  if (p === null || !Number.isFinite(p)) return "–";
  const v = 100 * p;
  return v >= 99.95 || v === 0 ? `${v.toFixed(0)} %` : v >= 0.1 ? `${v.toFixed(1)} %` : `${Number(v.toPrecision(2))} %`;
}
/* A probability: one under a hundredth reads better as "1 in N". */
function chance(p) {
  if (p === null || !(p > 0 && p < 0.01)) return percent(p);
  const n = Number((1 / p).toPrecision(2));
  return n < 1e9 ? `1 in ${count(n)}` : `1 in 10${superscript(Math.round(-Math.log10(p)))}`;
}
const superscript = n => [...String(n)].map(c => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");

/* --- texts ------------------------------------------------------------------------------------------------------- */

const UNSEEN = /[\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]|(?! )\p{Zs}/u;
const SPACES = { " ": "sp", "\n": "nl", "\t": "tab" }; // classes: CSS draws their marks, the text stays as it is
const SELECTOR = /[\ufe0e\ufe0f]/; // chooses between text and emoji form of the character before it

function escaped(c) { // as klft.writing.visible has it
  if (c === "\r") return "\\r";
  const code = c.codePointAt(0), [letter, width] = code < 256 ? ["x", 2] : code < 65536 ? ["u", 4] : ["U", 8];
  return `\\${letter}${code.toString(16).padStart(width, "0")}`;
}

/* A token's text in [class, text] parts: white space by itself, what cannot be seen as an escape, all else as it is. */
const partsOf = [];
function parts(index) {
  if (partsOf[index]) return partsOf[index];
  const text = data.vocabulary[index], found = text === "" ? [["none", ""]] : [];
  let run = /^\p{M}/u.test(text) ? "\u25cc" : ""; // a circle to carry an accent that came without its letter
  const flush = () => { if (run) found.push(["", run]); run = ""; };
  [...text].forEach((c, i) => {
    if (!SPACES[c] && (!UNSEEN.test(c) || (i && SELECTOR.test(c)))) return void (run += c);
    flush();
    found.push(SPACES[c] ? [SPACES[c], c] : ["escape", escaped(c)]);
  });
  flush();
  if (data.cut[index]) found.push(["escape", `… cut, ${count(data.cut[index])} characters`]);
  return (partsOf[index] = found);
}
const shown = index => parts(index).map(([kind, text]) => (kind ? make("span", { class: kind }, text) : text));
const textOf = index => parts(index).map(part => part[1]).join("");
const classOf = index => data.class_names[columns.classes[index]];
const chip = (index, name = "span") => make(name, { class: "tok" }, ...shown(index));

/* --- what can be coloured ---------------------------------------------------------------------------------------- */

const NULL = 0xffffffff; // the bits of "not measured", see report.py
const known = {}; // name -> whether there is such a number at a token
/* A number of a token, by its place on the page. */
function number(name, at) {
  const column = columns[name];
  if (!column) return null;
  known[name] ??= new Uint32Array(column.buffer);
  return known[name][at] === NULL ? null : column[at];
}
const less = (a, b) => at => {
  const x = number(a, at), y = number(b, at);
  return x === null || y === null ? null : x - y;
};
const METRICS = {
  reverse: { name: "Reverse KL", of: at => number("reverse_kl", at), ramp: "reverse" },
  forward: { name: "Forward KL", of: at => number("forward_kl", at), ramp: "forward" },
  difference: {
    name: "Difference", long: "forward − reverse KL", signed: true, ends: ["policy invents", "policy drops"],
    of: less("forward_kl", "reverse_kl"),
  },
  ratio: {
    name: "Log-ratio", long: "log p of the policy − of the reference", signed: true,
    ends: ["likelier in the reference", "likelier in the policy"], of: less("logp", "ref_logp"),
  },
  entropy: {
    name: "Entropy change", long: "entropy of the policy − of the reference", signed: true,
    ends: ["policy is surer", "policy is less sure"], of: less("entropy", "ref_entropy"),
  },
};

/* Equal steps of lightness and hue in OKLab, from the page's own colour outwards: orange reverse, blue forward. */
const RAMPS = {
  light: "#9e4502 #b76222 #d0803b #e89e54 #f2be87 #f6ddbf #fafafa #c8e1f8 #99c6f3 #6ca9e9 #4e8ad4 #326bbf #1b4ba9",
  dark: "#fbb961 #dd9547 #be732f #9e5317 #743f1b #492e1e #1d1e22 #243551 #2a4c83 #2d66b5 #4688cd #64abe6 #86cdff",
};
for (const name in RAMPS) RAMPS[name] = RAMPS[name].split(" ");
const channels = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
function mix(ramp, at) { // at in [0, 1]
  const x = at * (ramp.length - 1), i = Math.min(Math.floor(x), ramp.length - 2);
  const [a, b] = [channels(ramp[i]), channels(ramp[i + 1])];
  return a.map((v, k) => Math.round(v + (b[k] - v) * (x - i)));
}
function luminance(rgb) {
  const [r, g, b] = rgb.map(v => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const ink = rgb => (luminance(rgb) > 0.179 ? "#000000" : "#ffffff"); // whichever has the larger contrast, always >= 4.5
const css = rgb => `rgb(${rgb.join(" ")})`;

/* --- the heatmap ------------------------------------------------------------------------------------------------- */

const view = { metric: "reverse", top: 1, threshold: 0 };
const texts = []; // {order, sequence, from, to, turns, section, list, drawn, painted}; from and to are places on the page
const elements = []; // of the tokens that are drawn
const visible = new Set(); // texts
let total = 0; // tokens on the page

const textAt = at => {
  let low = 0, high = texts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (texts[middle].from <= at) low = middle; else high = middle - 1;
  }
  return texts[low];
};
const keyOf = s => `${s.step}.${s.rank}.${s.sample_id}`;
const sumOf = (name, from, to) => {
  let sum = 0, any = false;
  for (let at = from; at < to; at++) {
    const v = columns.prompt[at] ? null : number(name, at);
    if (v !== null && Number.isFinite(v)) [sum, any] = [sum + v, true];
  }
  return any ? sum : null;
};

/* A turn ends with its end-of-turn token and the white space after it: told by classes, as texts can be hidden. */
function turnsOf(from, to) {
  const turns = [];
  const is = (kind, at) => classOf(columns.token[at]) === kind;
  for (let at = from, start = from; at < to; at++) {
    if (at + 1 < to && !is("end of turn", at)) continue;
    while (at + 1 < to && is("whitespace", at + 1)) at++;
    turns.push({ from: start, to: (start = at + 1) });
  }
  return turns;
}

/* Every text stands there as plain text, to be found and copied; its tokens are drawn when it comes into view. */
function layTexts() {
  const box = byId("heatmap");
  data.sequences.forEach((sequence, order) => {
    const from = total, to = (total += sequence.size), s = sequence, turns = turnsOf(from, to);
    const facts = [`Σ reverse ${nats(value(s.sum_reverse))}`, `Σ forward ${nats(value(s.sum_forward))} nats`, s.why];
    if (s.reward !== null) facts.splice(2, 0, `reward ${nats(value(s.reward))}`);
    if (s.missing) facts.push(s.missing);
    const link = make("a", { href: `#${keyOf(s)}`, tabindex: -1 }, s.name);
    const heading = make("h3", {}, `${order + 1}. `, link, ...facts.map(text => make("span", {}, text)));
    const list = make("div", { class: "tokens", role: "listbox", "aria-label": `Tokens of ${s.name}` });
    turns.forEach((turn, i) => {
      const sums = [["reverse", "reverse_kl"], ["forward", "forward_kl"]].map(([side, name]) => [side, sumOf(name, turn.from, turn.to)]);
      const told = sums.filter(([, sum]) => sum !== null).map(([side, sum]) => `Σ ${side} ${nats(sum, 3)}`).join(", ");
      const label = `Turn ${i + 1}: ${told || "given"}`;
      turn.block = make("div", turns.length < 2 ? {} : { class: `turn${told ? "" : " given"}`, role: "group", "aria-label": label, "data-sums": label });
      turn.block.append(Array.from(columns.token.subarray(turn.from, turn.to), textOf).join(""));
      list.append(turn.block);
    });
    const section = make("section", { class: "seq" }, heading, list);
    box.append(section);
    texts.push({ order, sequence, from, to, turns, section, list, drawn: false, painted: null });
  });
  const watch = new IntersectionObserver(entries => {
    for (const { target, isIntersecting } of entries) {
      const text = texts[target.dataset.order];
      if (!isIntersecting) visible.delete(text);
      else { visible.add(text); drawText(text); }
    }
  }, { root: box, rootMargin: "400px 0px" });
  texts.forEach(text => { text.section.dataset.order = text.order; watch.observe(text.section); });
  addEventListener("beforeprint", () => texts.forEach(drawText));
}

function drawText(text) {
  if (!text.drawn) {
    text.drawn = true;
    for (const turn of text.turns) {
      turn.block.replaceChildren();
      for (let at = turn.from; at < turn.to; at++) {
        const index = columns.token[at], prompt = columns.prompt[at];
        const kind = `t${prompt ? " prompt" : number("logp", at) === null ? " unscored" : number("weight", at) === 0 ? " weightless" : ""}`;
        const text = data.vocabulary[index], word = /^( \S|<id \d+>$)/.test(text) && text.length < 24; // breaks before it
        if (word) turn.block.append(make("wbr"));
        const role = { role: "option", "aria-selected": "false", tabindex: at === current ? 0 : -1 };
        turn.block.append((elements[at] = make("span", { class: word ? `${kind} word` : kind, ...role, "data-at": at }, ...shown(index))));
      }
    }
  }
  paintText(text);
}
const elementOf = at => { drawText(textAt(at)); return elements[at]; };

/* A round number at the 99th percentile of what is shown: a few outliers must not bleach the rest. */
function topOf(metric) {
  const sizes = new Float32Array(total);
  let n = 0;
  for (let at = 0; at < total; at++) {
    const v = columns.prompt[at] ? null : metric.of(at);
    if (Number.isFinite(v)) sizes[n++] = Math.abs(v);
  }
  return roundUp(sizes.subarray(0, n).sort());
}
function roundUp(sizes) {
  const high = sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes.at(-1) || 1;
  const power = 10 ** Math.floor(Math.log10(high));
  return [1, 2, 5, 10].map(k => k * power).find(v => v >= high * 0.999);
}

/* Square-root scale: 0 stays 0, and small values keep some of the ramp. */
function colourOf(v, metric) {
  const ramp = RAMPS[darkness.matches ? "dark" : "light"], x = Math.sqrt(Math.min(Math.abs(v) / view.top, 1));
  return mix(ramp, 0.5 + ((metric.signed ? Math.sign(v) : metric.ramp === "reverse" ? -1 : 1) * x) / 2);
}

/* Colours of one text, where they are not yet those of the present view. */
function paintText(text) {
  const metric = METRICS[view.metric], key = [view.metric, view.top, view.threshold, darkness.matches].join();
  if (text.painted === key) return;
  text.painted = key;
  for (let at = text.from; at < text.to; at++) {
    const v = columns.prompt[at] ? null : metric.of(at), { style, classList } = elements[at];
    classList.toggle("odd", v !== null && !Number.isFinite(v));
    if (v === null || !Number.isFinite(v) || Math.abs(v) < view.threshold) {
      style.backgroundColor = style.color = "";
    } else {
      const rgb = colourOf(v, metric);
      style.backgroundColor = css(rgb);
      style.color = ink(rgb);
    }
  }
}

function paint() {
  const metric = METRICS[view.metric];
  let coloured = 0, measured = 0;
  for (let at = 0; at < total; at++) {
    const v = columns.prompt[at] ? null : metric.of(at);
    if (v === null) continue;
    measured++;
    if (!(Math.abs(v) < view.threshold)) coloured++;
  }
  visible.forEach(paintText);
  const least = `${metric.signed ? "±" : ""}${nats(view.threshold)} nats`;
  byId("threshold-text").textContent = `${least}: ${count(coloured)} of ${count(measured)} tokens`;
  byId("threshold").setAttribute("aria-valuetext", byId("threshold-text").textContent);
}

function drawLegend() {
  const metric = METRICS[view.metric], { signed } = metric, { top } = view, host = byId("legend");
  const width = Math.min(host.clientWidth, 704) || 320, height = signed ? 52 : 38, edge = 12, wide = width - 2 * edge;
  const x = v => edge + wide * (signed ? 0.5 : 0) + (wide / (signed ? 2 : 1)) * Math.sign(v) * Math.sqrt(Math.abs(v) / top);
  const range = `from ${signed ? nats(-top) : 0} to ${nats(top)}`;
  const label = `Colour scale of ${metric.long ?? metric.name} in nats, ${range}, square-root spaced`;
  const svg = make("svg", { role: "img", "aria-label": label, width, height, viewBox: `0 0 ${width} ${height}` });
  for (let i = 0; i < 96; i++) {
    const at = (i + 0.5) / 96, v = top * (signed ? Math.sign(at - 0.5) * (2 * at - 1) ** 2 : at ** 2);
    const place = { x: edge + (wide * i) / 96, y: 2, width: wide / 96 + 0.6, height: 14 };
    svg.append(make("rect", { ...place, fill: css(colourOf(v, metric)) }));
  }
  const parts = signed ? [0, 0.1, 0.5, 1] : width < 500 ? [0, 0.1, 0.5, 1] : [0, 0.02, 0.1, 0.25, 0.5, 1];
  const marks = [...(signed ? parts.slice(1).reverse().map(p => -p) : []), ...parts].map(p => p * top);
  for (const v of marks) {
    const last = v === top, first = v === marks[0], text = (first && signed ? "≤ " : last ? "≥ " : "") + nats(v);
    svg.append(make("line", { class: "axis", x1: x(v), x2: x(v), y1: 16, y2: 20, stroke: "currentColor" }));
    const [at, anchor] = last ? [width - 2, "end"] : first && signed ? [2, "start"] : [x(v), "middle"];
    svg.append(make("text", { x: at, y: 33, "text-anchor": anchor }, last ? `${text} nats` : text));
  }
  if (metric.ends) {
    const [left, right] = metric.ends;
    svg.append(make("text", { x: 2, y: 49 }, `← ${left}`));
    svg.append(make("text", { x: width - 2, y: 49, "text-anchor": "end" }, `${right} →`));
  }
  host.replaceChildren(svg);
}

function choose(name) {
  view.metric = name;
  view.top = topOf(METRICS[name]);
  setThreshold();
  drawLegend();
}
function setThreshold() {
  view.threshold = view.top * (byId("threshold").value / 1000) ** 2;
  paint();
}

function drawControls() {
  const host = byId("metrics");
  for (const [key, metric] of Object.entries(METRICS)) {
    let absent = true;
    for (let at = 0; absent && at < total; at++) absent = metric.of(at) === null;
    const input = make("input", { type: "radio", name: "metric", value: key, disabled: absent ? "" : null });
    if (key === view.metric) input.checked = true;
    input.addEventListener("change", () => choose(key));
    host.append(make("label", metric.long ? { title: metric.long } : {}, input, metric.name));
  }
  byId("threshold").addEventListener("input", setThreshold);
  byId("marks").addEventListener("change", event => byId("heatmap").classList.toggle("marks", event.target.checked));
}

/* --- the card ---------------------------------------------------------------------------------------------------- */

const card = byId("card");
let carded = null, leaving = 0;

function topList(name, side, at) {
  const box = make("div", { class: side === "top" ? "policy" : "ref" }, make("h4", {}, `${name} would say`));
  const many = columns[`${side}_n`]?.[at];
  if (!many) return box.append(make("p", { class: "note" }, "not recorded")), box;
  starts[side] ??= columns[`${side}_n`].reduce((sums, n) => { sums.push(sums.at(-1) + n); return sums; }, [0]);
  const rows = Array.from({ length: many }, (_, i) => {
    const place = starts[side][at] + i, id = columns[`${side}_ids`][place], p = columns[`${side}_p`][place];
    const bar = make("span", { class: "bar" });
    bar.style.width = `${100 * p}%`;
    return make("li", id === columns.token[at] ? { class: "chosen" } : {}, bar, chip(id), make("span", {}, chance(p)));
  });
  return box.append(make("ol", {}, ...rows)), box;
}
const starts = {}; // of each token's top lists

function fillCard(at) {
  const of = name => number(name, at), p = of("logp"), q = of("ref_logp"), short = v => nats(v, 3);
  const facts = [
    ["p policy", "p", chance(p === null ? null : Math.exp(p))], ["p reference", "ref_p", chance(q === null ? null : Math.exp(q))],
    ["reverse KL", "reverse_kl", short(of("reverse_kl"))], ["forward KL", "forward_kl", short(of("forward_kl"))],
    ["entropy", "entropy", short(of("entropy"))], ["ref. entropy", "ref_entropy", short(of("ref_entropy"))],
    ["log-ratio", "log_ratio", short(METRICS.ratio.of(at))], ["advantage", "advantage", short(of("advantage"))],
    ["weight of its KL", "weight", short(of("weight"))],
  ].filter(([, name]) => !["advantage", "weight"].includes(name) || of(name) !== null);
  const index = columns.token[at], { sequence } = textAt(at);
  const where = [`id ${columns.ids[index]}`, classOf(index), `position ${columns.position[at]}`, columns.prompt[at] ? "prompt" : "", p === null ? "not scored" : "", sequence.name];
  const lines = facts.flatMap(([label, name, text]) => [make("dt", {}, label), make("dd", { "data-field": name }, text)]);
  card.replaceChildren(
    make("div", { class: "said" }, chip(index)),
    make("div", { class: "note" }, where.filter(text => text).join(" · ")),
    make("dl", {}, ...lines),
    make("div", { class: "tops" }, topList("policy", "top", at), topList("reference", "ref_top", at)));
}

/* Below the token's last line if there is room, else above its first, else at the edge of the window that is further. */
function placeCard() {
  const lines = elements[carded].getClientRects(), first = lines[0], size = card.getBoundingClientRect();
  const wide = document.documentElement.clientWidth, high = window.innerHeight, space = 8;
  const below = lines[lines.length - 1].bottom + space, above = first.top - space - size.height;
  const far = first.top > high / 2 ? space : high - space - size.height;
  const top = below + size.height <= high - space ? below : above >= space ? above : far;
  card.style.left = `${Math.max(space, Math.min(boxOf(carded).left, wide - size.width - space))}px`;
  card.style.top = `${Math.max(space, top)}px`;
}

function showCard(at) {
  hideCard();
  carded = at;
  fillCard(at);
  elements[at].setAttribute("aria-describedby", "card");
  card.hidden = false;
  placeCard();
}
function hideCard() {
  clearTimeout(leaving);
  if (carded !== null) elements[carded].removeAttribute("aria-describedby");
  carded = null;
  card.hidden = true;
}
const hideSoon = () => { clearTimeout(leaving); leaving = setTimeout(hideCard, 180); };

/* --- moving about ------------------------------------------------------------------------------------------------ */

let current = 0;
const placeOf = event => { const e = event.target.closest?.(".t"); return e ? Number(e.dataset.at) : null; };

function focusToken(at, found = false) {
  if (elements[current]) elements[current].tabIndex = -1;
  current = at;
  const element = elementOf(at);
  element.tabIndex = 0;
  document.querySelector(".t.target")?.classList.remove("target");
  if (found) element.classList.add("target");
  element.scrollIntoView({ block: found ? "center" : "nearest", behavior: "instant" });
  element.focus({ preventScroll: true });
}

/* A token's place is the page's address: #step.rank.sample.position, or without the position a whole text's. */
function followAddress() {
  const found = location.hash.match(/^#(\d+\.\d+\.-?\d+)(?:\.(\d+))?$/), text = found && texts.find(t => keyOf(t.sequence) === found[1]);
  if (!text) return;
  const at = found[2] === undefined ? -1 : columns.position.indexOf(Number(found[2]), text.from);
  if (at >= 0 && at < text.to) return focusToken(at, true);
  byId("tokens").scrollIntoView({ behavior: "instant" });
  text.section.scrollIntoView({ behavior: "instant" });
}
function setAddress(at) {
  try {
    history.replaceState(null, "", `#${keyOf(textAt(at).sequence)}.${columns.position[at]}`);
  } catch { /* a frame, as a notebook's, may have no address */ }
}

/* The token above or below: on the next line, nearest in x. A token can go over two lines: its last part counts. */
const boxOf = at => [...elementOf(at).getClientRects()].findLast(box => box.width) ?? elementOf(at).getClientRects()[0];
function lineAway(at, step) {
  const from = boxOf(at), middle = from.left + from.width / 2;
  let best = at, distance = Infinity, line = null;
  for (let i = at + step; i >= 0 && i < total; i += step) {
    const box = boxOf(i);
    if (!box || Math.abs(box.top - from.top) < 3) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) >= 3) break;
    const away = Math.abs(box.left + box.width / 2 - middle);
    if (away < distance) [best, distance] = [i, away];
  }
  return best;
}
const edge = (at, step) => (step < 0 ? textAt(at).from : textAt(at).to - 1);
const MOVES = {
  ArrowRight: at => at + 1, ArrowLeft: at => at - 1, ArrowDown: at => lineAway(at, 1), ArrowUp: at => lineAway(at, -1),
  Home: at => edge(at, -1), End: at => edge(at, 1), PageDown: at => edge(at, 1) + 1,
  PageUp: at => edge(Math.max(edge(at, -1) - 1, 0), -1),
};

function listen() {
  const box = byId("heatmap");
  box.addEventListener("mouseover", event => { const at = placeOf(event); if (at !== null) showCard(at); });
  box.addEventListener("mouseout", hideSoon);
  box.addEventListener("focusin", event => {
    const at = placeOf(event);
    if (at === null) return;
    elements[at].setAttribute("aria-selected", "true");
    showCard(at);
  });
  box.addEventListener("focusout", event => {
    if (placeOf(event) !== null) event.target.setAttribute("aria-selected", "false");
    hideSoon();
  });
  box.addEventListener("click", event => {
    const at = placeOf(event);
    if (at === null || !getSelection().isCollapsed) return;
    focusToken(at);
    setAddress(at);
  });
  box.addEventListener("keydown", event => {
    const at = placeOf(event), move = MOVES[event.key];
    if (at !== null && event.key === "Enter") setAddress(at);
    if (at === null || !move || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const to = move(at);
    if (to >= 0 && to < total) focusToken(to);
  });
  card.addEventListener("mouseenter", () => clearTimeout(leaving));
  card.addEventListener("mouseleave", hideSoon);
  document.addEventListener("keydown", event => { if (event.key === "Escape") hideCard(); });
  addEventListener("hashchange", followAddress);
  document.addEventListener("scroll", event => {
    if (carded === null || card.contains(event.target)) return;
    const token = elements[carded].getClientRects()[0], frame = box.getBoundingClientRect();
    if (token.bottom < Math.max(frame.top, 0) || token.top > Math.min(frame.bottom, innerHeight)) hideCard();
    else placeCard();
  }, { capture: true, passive: true });
}
