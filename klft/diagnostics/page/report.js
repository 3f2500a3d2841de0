/* The tables, and the start. */

/* Sorts by the column of a header's button: numbers by data-value, texts by alphabet; empty cells stay last. */
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const text = head.classList.contains("text"), was = head.getAttribute("aria-sort");
    const up = was === "none" ? text : was === "descending";
    for (const each of heads) if (each.hasAttribute("aria-sort")) each.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const keyed = [...body.rows].map(row => {
      const cell = row.cells[column];
      return { row, key: text ? cell.textContent : parseFloat(cell.dataset.value) };
    });
    const order = (a, b) => (text ? a.localeCompare(b, "en", { numeric: true }) : a - b), last = key => Number.isNaN(key);
    keyed.sort((a, b) => last(a.key) - last(b.key) || (last(a.key) ? 0 : up ? order(a.key, b.key) : order(b.key, a.key)));
    body.append(...keyed.map(each => each.row));
  }));
}

const textCell = (...content) => make("td", { class: "text" }, ...content);
function cell(v, text = nats(v)) {
  return make("td", { class: "num", "data-value": v === null || Number.isNaN(v) ? "" : v }, text);
}


function drawWorst() {
  const table = byId("worst-table"), found = new Map(texts.map(text => [keyOf(text.sequence), text]));
  const share = w => value(w[`${data.worst_by}_kl`]) / data.worst_total;
  let sum = 0;
  table.tBodies[0].append(...data.worst.map(w => {
    const text = found.get(keyOf(w)), place = text ? columns.position.indexOf(w.position, text.from) : -1;
    const at = place >= 0 && place < text.to ? place : null, token = chip(w.token);
    const said = at === null ? token : make("button", { class: "jump", type: "button", "data-at": at }, token);
    const around = [...w.before.map(i => chip(i)), make("mark", {}, chip(w.token)), ...w.after.map(i => chip(i))];
    const [p, q] = [w.logp, w.ref_logp].map(v => (v === null ? null : Math.exp(value(v))));
    return make("tr", {}, textCell(said), make("td", { class: "text context" }, ...around),
      cell(value(w.reverse_kl)), cell(value(w.forward_kl)), cell((sum += share(w)), percent(sum)),
      cell(p, chance(p)), cell(q, chance(q)), textCell(classOf(w.token) || "–"), make("td", { class: "text place" }, w.name), cell(w.position, count(w.position)));
  }));
  table.addEventListener("click", event => {
    const button = event.target.closest(".jump");
    if (!button) return;
    focusToken(Number(button.dataset.at), true);
    setAddress(Number(button.dataset.at));
  });
}

function drawCarriers() {
  let sum = 0;
  byId("carriers-table").tBodies[0].append(...data.carriers.map(r => {
    const numbers = ["reverse", "forward"].flatMap(side => {
      const [mean, share] = [value(r[`${side}_mean`]), value(r[`${side}_share`])];
      return [cell(mean), cell(share, percent(share))];
    });
    sum += value(r.reverse_share ?? r.forward_share);
    numbers.splice(2, 0, cell(sum, percent(sum)));
    const head = make("th", { scope: "row" }, chip(r.token));
    return make("tr", {}, head, textCell(classOf(r.token) || "–"), cell(r.count, count(r.count)), ...numbers);
  }));
}

function start() {
  layTexts();
  if (total) {
    drawControls();
    listen();
    choose(view.metric);
    drawn("legend", drawLegend);
    darkness.addEventListener("change", () => choose(view.metric));
  }
  if (data.positions.length) drawn("positions", drawPositions);
  if (data.histograms.reverse || data.histograms.forward) drawn("histogram", drawHistogram);
  if (data.steps.length > 1) drawn("steps-plot", drawSteps);
  if (pointTokens().all) drawn("scatter-plot", drawScatter);
  drawWorst();
  drawCarriers();
  document.querySelectorAll("table.sortable").forEach(sortable);
  texts.slice(0, 2).forEach(drawText); // before the first frame
  followAddress();
  document.documentElement.dataset.ready = "yes";
}
unpack().then(start, error => {
  byId("old").hidden = false; // a browser of before 2023
  console.error(error);
});
