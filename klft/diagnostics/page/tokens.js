/* The tokens: how a text is shown, the heatmap, its colours, the card, moving about by keyboard. */

const data = JSON.parse(document.getElementById("data").textContent);
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

/* --- numbers ----------------------------------------------------------------------------------------------------- */

/* JSON has no infinity: "Infinity", "-Infinity" and "NaN" come as strings. null is "not measured". */
const value = v => (v === null || v === undefined ? null : Number(v));
const minus = text => text.replace("-", "\u2212");
function nats(v) {
  if (v === null) return "–";
  if (!Number.isFinite(v)) return Number.isNaN(v) ? "NaN" : v > 0 ? "∞" : "−∞";
  const size = Math.abs(v);
  if (size !== 0 && size < 1e-3) return minus(v.toExponential(2).replace("e-", "e−"));
  return minus(Number(v.toPrecision(4)).toString());
}
function percent(p) {
  if (p === null || !Number.isFinite(p)) return "–";
  const v = 100 * p;
  return v >= 99.95 || v === 0 ? `${v.toFixed(0)} %` : v >= 0.1 ? `${v.toFixed(1)} %` : `${Number(v.toPrecision(2))} %`;
}
const count = n => n.toLocaleString("en");

/* --- texts ------------------------------------------------------------------------------------------------------- */

const UNSEEN = /[\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]|(?! )\p{Zs}/u;
const GLYPHS = { " ": "␣", "\n": "⏎", "\t": "⇥" };
const SELECTOR = /[\ufe0e\ufe0f]/; // chooses between text and emoji form of the character before it

function escaped(c) { // as klft.writing.visible has it
  if (c === "\r") return "\\r";
  const code = c.codePointAt(0), [letter, width] = code < 256 ? ["x", 2] : code < 65536 ? ["u", 4] : ["U", 8];
  return `\\${letter}${code.toString(16).padStart(width, "0")}`;
}

/* A token's text: white space as glyphs, what cannot be seen as an escape, all else as it is. */
function shown(index) {
  const text = data.vocabulary[index], pieces = new DocumentFragment(), characters = [...text];
  let run = "";
  const flush = () => { if (run) pieces.append(run); run = ""; };
  if (text === "") pieces.append(make("span", { class: "glyph" }, "∅"));
  if (/^\p{M}/u.test(text)) run = "\u25cc"; // a circle to carry an accent that came without its letter
  characters.forEach((c, i) => {
    const glyph = GLYPHS[c];
    if (!glyph && (!UNSEEN.test(c) || (i && SELECTOR.test(c)))) return void (run += c);
    flush();
    pieces.append(make("span", { class: !glyph ? "escape" : c === " " ? "glyph" : "glyph tall" }, glyph ?? escaped(c)));
  });
  flush();
  const cut = data.cut[index];
  if (cut) pieces.append(make("span", { class: "escape" }, `… cut, ${count(cut)} characters`));
  return pieces;
}
const classOf = index => data.class_names[data.classes[index]];
const chip = (index, name = "span") => make(name, { class: "tok" }, shown(index));

/* --- what can be coloured ---------------------------------------------------------------------------------------- */

const both = (a, b, f) => (a === null || b === null ? null : f(a, b));
const METRICS = {
  reverse: { name: "Reverse KL", of: t => t.reverse },
  forward: { name: "Forward KL", of: t => t.forward },
  difference: {
    name: "Difference", long: "forward − reverse KL", signed: true, ends: ["policy invents", "policy drops"],
    of: t => both(t.forward, t.reverse, (f, r) => f - r),
  },
  ratio: {
    name: "Log-ratio", long: "log p of the policy − of the reference", signed: true,
    ends: ["likelier in the reference", "likelier in the policy"], of: t => both(t.logp, t.refLogp, (p, q) => p - q),
  },
  entropy: {
    name: "Entropy change", long: "entropy of the policy − of the reference", signed: true,
    ends: ["policy is surer", "policy is less sure"], of: t => both(t.entropy, t.refEntropy, (p, q) => p - q),
  },
};

/* Equal steps of lightness and hue in OKLab, from the page's own colour outwards. */
const RAMPS = {
  light: "#fbfaf4 #e8f1c5 #c4e5af #98d7a7 #67c8a7 #42b4a7 #219fa5 #09899f #0d729a #235b95 #34438a #382c75 #36155c",
  dark: "#1d1e24 #262547 #2c3364 #254a78 #186286 #027990 #009195 #25a695 #4fba8d #7eca7f #afd66e #dce36f #ffed86",
  lightSigned: "#9e4502 #b76222 #d0803b #e89e54 #f2be87 #f6ddbf #fafafa #c8e1f8 #99c6f3 #6ca9e9 #4e8ad4 #326bbf #1b4ba9",
  darkSigned: "#fbb961 #dd9547 #be732f #9e5317 #743f1b #492e1e #1d1e22 #243551 #2a4c83 #2d66b5 #4688cd #64abe6 #86cdff",
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

const tokens = []; // every token shown, in order of the page
const view = { metric: "reverse", top: 1, threshold: 0 };

function readTokens() {
  data.sequences.forEach((s, order) => s.token.forEach((index, i) => {
    const number = name => (s[name] ? value(s[name][i]) : null);
    tokens.push({
      order, sequence: s, at: tokens.length, index, position: s.position[i], prompt: s.prompt[i] === "1",
      quadrant: data.quadrants.names[s.quadrant[i]],
      logp: number("logp"), refLogp: number("ref_logp"), reverse: number("reverse_kl"), forward: number("forward_kl"),
      entropy: number("entropy"), refEntropy: number("ref_entropy"), advantage: number("advantage"),
      weight: number("weight"),
      top: s.top_ids && s.top_ids[i] ? [s.top_ids[i], s.top_p[i]] : null,
      refTop: s.ref_top_ids && s.ref_top_ids[i] ? [s.ref_top_ids[i], s.ref_top_p[i]] : null,
    });
  }));
}

const ranked = [...data.sequences, ...data.worst].some(s => s.rank !== 0);
const nameOf = s => `step ${s.step}, ${ranked ? `rank ${s.rank}, ` : ""}sample ${s.sample_id}`;

function drawTokens() {
  const box = byId("heatmap");
  let next = 0;
  data.sequences.forEach((s, order) => {
    const facts = [`Σ reverse ${nats(value(s.sum_reverse))}`, `Σ forward ${nats(value(s.sum_forward))} nats`, s.why];
    if (s.reward !== null) facts.splice(2, 0, `reward ${nats(value(s.reward))}`);
    if (s.missing) facts.push(s.missing);
    const heading = make("h3", {}, `${order + 1}. ${nameOf(s)}`, ...facts.map(text => make("span", {}, text)));
    const list = make("div", { class: "tokens", role: "listbox", "aria-label": `Tokens of ${nameOf(s)}` });
    for (; next < tokens.length && tokens[next].order === order; next++) {
      const token = tokens[next], text = data.vocabulary[token.index];
      const kind = `t${token.prompt ? " prompt" : token.logp === null ? " unscored" : token.weight === 0 ? " weightless" : ""}${/^\s+$/.test(text) ? " blank" : ""}`;
      const role = { role: "option", "aria-selected": "false", tabindex: next ? -1 : 0 };
      token.element = make("span", { class: kind, ...role, "data-at": next }, shown(token.index));
      if (/^\s/.test(text)) list.append(make("wbr"));
      list.append(token.element);
      if (text.endsWith("\n")) list.append(make("br"));
    }
    box.append(make("section", { class: "seq" }, heading, list));
  });
}

/* A round number at the 99th percentile of what is shown: a few outliers must not bleach the rest. */
function topOf(metric) {
  const values = tokens.filter(t => !t.prompt).map(metric.of).filter(Number.isFinite);
  const sizes = values.map(Math.abs).sort((a, b) => a - b);
  const high = sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes.at(-1) || 1;
  const power = 10 ** Math.floor(Math.log10(high));
  return [1, 2, 5, 10].map(k => k * power).find(v => v >= high * 0.999);
}

/* Square-root scale: 0 stays 0, and small values keep some of the ramp. */
function colourOf(v, metric) {
  const ramp = RAMPS[(darkness.matches ? "dark" : "light") + (metric.signed ? "Signed" : "")];
  const x = Math.sqrt(Math.min(Math.abs(v) / view.top, 1));
  return mix(ramp, metric.signed ? 0.5 + (Math.sign(v) * x) / 2 : x);
}

function paint() {
  const metric = METRICS[view.metric];
  let coloured = 0, measured = 0;
  for (const token of tokens) {
    const v = token.prompt ? null : metric.of(token), style = token.element.style;
    token.element.classList.toggle("odd", v !== null && !Number.isFinite(v));
    style.backgroundColor = style.color = "";
    if (v === null) continue;
    measured++;
    if (!Number.isFinite(v)) { coloured++; continue; }
    if (Math.abs(v) < view.threshold) continue;
    const rgb = colourOf(v, metric);
    style.backgroundColor = css(rgb);
    style.color = ink(rgb);
    coloured++;
  }
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
    const absent = tokens.every(t => metric.of(t) === null);
    const input = make("input", { type: "radio", name: "metric", value: key, disabled: absent ? "" : null });
    if (key === view.metric) input.checked = true;
    input.addEventListener("change", () => choose(key));
    host.append(make("label", metric.long ? { title: metric.long } : {}, input, metric.name));
  }
  byId("threshold").addEventListener("input", setThreshold);
}

/* --- the card ---------------------------------------------------------------------------------------------------- */

const card = byId("card");
let carded = null, leaving = 0;

function topList(title, list, kind, index) {
  const side = make("div", { class: kind }, make("h4", {}, title));
  if (!list) return side.append(make("p", { class: "note" }, "not recorded")), side;
  const rows = list[0].map((id, i) => {
    const bar = make("span", { class: "bar" });
    bar.style.width = `${100 * value(list[1][i])}%`;
    const share = make("span", {}, percent(value(list[1][i])));
    return make("li", id === index ? { class: "chosen" } : {}, bar, chip(id), share);
  });
  return side.append(make("ol", {}, ...rows)), side;
}

function fillCard(t) {
  const p = t.logp === null ? null : Math.exp(t.logp), q = t.refLogp === null ? null : Math.exp(t.refLogp);
  const facts = [
    ["p policy", "p", percent(p)], ["p reference", "ref_p", percent(q)],
    ["reverse KL", "reverse_kl", nats(t.reverse)], ["forward KL", "forward_kl", nats(t.forward)],
    ["entropy", "entropy", nats(t.entropy)], ["ref. entropy", "ref_entropy", nats(t.refEntropy)],
    ["log-ratio", "log_ratio", nats(METRICS.ratio.of(t))], ["advantage", "advantage", nats(t.advantage)],
    ["weight of its KL", "weight", nats(t.weight)],
  ].filter(([, name]) => !["advantage", "weight"].includes(name) || t[name] !== null);
  const kind = classOf(t.index), id = data.ids[t.index];
  const where = [`id ${id}`, kind, `position ${t.position}`, t.prompt ? "prompt" : "", t.logp === null ? "not scored" : "", nameOf(t.sequence)];
  const lines = facts.flatMap(([label, name, text]) => [make("dt", {}, label), make("dd", { "data-field": name }, text)]);
  const tops = [["policy", t.top, "policy"], ["reference", t.refTop, "ref"]];
  card.replaceChildren(
    make("div", { class: "said" }, chip(t.index)),
    make("div", { class: "note" }, where.filter(text => text).join(" · ")),
    make("dl", {}, ...lines),
    make("div", { class: "tops" }, ...tops.map(([name, list, side]) => topList(`${name} would say`, list, side, t.index))));
}

/* Below the token's last line if there is room, else above its first, else at the edge of the window that is further. */
function placeCard() {
  const lines = carded.element.getClientRects(), first = lines[0], size = card.getBoundingClientRect();
  const wide = document.documentElement.clientWidth, high = window.innerHeight, space = 8;
  const below = lines[lines.length - 1].bottom + space, above = first.top - space - size.height;
  const far = first.top > high / 2 ? space : high - space - size.height;
  const top = below + size.height <= high - space ? below : above >= space ? above : far;
  card.style.left = `${Math.max(space, Math.min(first.left, wide - size.width - space))}px`;
  card.style.top = `${Math.max(space, top)}px`;
}

function showCard(token) {
  clearTimeout(leaving);
  carded?.element.removeAttribute("aria-describedby");
  carded = token;
  fillCard(token);
  token.element.setAttribute("aria-describedby", "card");
  card.hidden = false;
  placeCard();
}
function hideCard() {
  clearTimeout(leaving);
  carded?.element.removeAttribute("aria-describedby");
  carded = null;
  card.hidden = true;
}
const hideSoon = () => { clearTimeout(leaving); leaving = setTimeout(hideCard, 180); };

/* --- moving about ------------------------------------------------------------------------------------------------ */

let current = 0;
const tokenOf = event => { const e = event.target.closest?.(".t"); return e ? tokens[e.dataset.at] : null; };

function focusToken(at, found = false) {
  tokens[current].element.tabIndex = -1;
  current = at;
  const { element } = tokens[at];
  element.tabIndex = 0;
  document.querySelector(".t.target")?.classList.remove("target");
  if (found) element.classList.add("target");
  element.scrollIntoView({ block: found ? "center" : "nearest", behavior: "instant" });
  element.focus({ preventScroll: true });
}

/* The token above or below: on the next line, nearest in x. */
function lineAway(at, step) {
  const from = tokens[at].element.getClientRects()[0], middle = from.left + from.width / 2;
  let best = at, distance = Infinity, line = null;
  for (let i = at + step; tokens[i]; i += step) {
    const box = tokens[i].element.getClientRects()[0];
    if (!box || Math.abs(box.top - from.top) < 3) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) >= 3) break;
    const away = Math.abs(box.left + box.width / 2 - middle);
    if (away < distance) [best, distance] = [i, away];
  }
  return best;
}
const edge = (at, step) => { while (tokens[at + step]?.order === tokens[at].order) at += step; return at; };
const MOVES = {
  ArrowRight: at => at + 1, ArrowLeft: at => at - 1, ArrowDown: at => lineAway(at, 1), ArrowUp: at => lineAway(at, -1),
  Home: at => edge(at, -1), End: at => edge(at, 1), PageDown: at => edge(at, 1) + 1,
  PageUp: at => edge(Math.max(edge(at, -1) - 1, 0), -1),
};

function listen() {
  const box = byId("heatmap");
  box.addEventListener("mouseover", event => { const t = tokenOf(event); if (t) showCard(t); });
  box.addEventListener("mouseout", hideSoon);
  box.addEventListener("focusin", event => {
    const t = tokenOf(event);
    if (!t) return;
    t.element.setAttribute("aria-selected", "true");
    showCard(t);
  });
  box.addEventListener("focusout", event => {
    tokenOf(event)?.element.setAttribute("aria-selected", "false");
    hideSoon();
  });
  box.addEventListener("click", event => { const t = tokenOf(event); if (t) focusToken(t.at); });
  box.addEventListener("keydown", event => {
    const t = tokenOf(event), move = MOVES[event.key];
    if (!t || !move || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const to = move(t.at);
    if (tokens[to]) focusToken(to);
  });
  card.addEventListener("mouseenter", () => clearTimeout(leaving));
  card.addEventListener("mouseleave", hideSoon);
  document.addEventListener("keydown", event => { if (event.key === "Escape") hideCard(); });
  document.addEventListener("scroll", event => {
    if (!carded || card.contains(event.target)) return;
    const token = carded.element.getClientRects()[0], frame = box.getBoundingClientRect();
    if (token.bottom < Math.max(frame.top, 0) || token.top > Math.min(frame.bottom, innerHeight)) hideCard();
    else placeCard();
  }, { capture: true, passive: true });
}
