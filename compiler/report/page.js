// The page: cards, filters, tabs, table. Everything it shows is in the embedded JSON.

const rows = data.rows.map((row, index) => ({ ...row, id: index }));
for (const row of rows) row.several = rows.some(other => other.target === row.target && other.backend !== row.backend);
const state = { axis: "cost", family: "all", search: "", tab: "latency", sort: null, down: false, open: new Set(), chosen: 0, all: false };

const FIGURES = {
  latency: { label: "Latency", value: r => r.latency_s, interval: r => r.interval_s, measured: r => r.measured && r.measured.latency_s, shown: seconds, caption: "Seconds of one call; shorter is better. The axis is logarithmic." },
  throughput: { label: "Throughput", more: true, value: r => r.throughput_per_s, interval: r => r.interval_s && !r.pipelined ? [1 / r.interval_s[1], 1 / r.interval_s[0]] : null, measured: r => r.measured && 1 / r.measured.latency_s, shown: rate, caption: "Calls a second with one call in flight, or one after another through a pipeline; more is better." },
  memory: { label: "Memory", value: r => r.memory_bytes, interval: r => r.memory_interval_bytes, measured: none, shown: bytes, caption: "Weights and the largest set of live values, on one chip." },
  energy: { label: "Energy", value: r => r.energy_j, interval: r => r.energy_interval_j, measured: none, shown: joules, caption: "Of one call. Where idle power is unknown this is the power cap for the whole call, and the interval reaches down." },
  cost: { label: "Cost", value: r => r.usd_per_million, interval: r => r.usd_per_million_interval, measured: none, shown: dollars, caption: "Dollars for a million calls at the listed price, with the target kept busy." },
};
for (const figure of Object.values(FIGURES)) {
  figure.none = "Nothing to show: this figure is unknown for every candidate here.";
  figure.mark = value => short(figure.shown(value));
  figure.tip = row => [row.title || row.target, `${row.backend}, recipe ${row.recipe}`, `${figure.shown(figure.value(row))}` + (figure.interval(row) ? ` (${range(figure.interval(row), figure.shown)})` : ""),
    figure.measured(row) ? `measured ${figure.shown(figure.measured(row))}, ${row.measured.where}` : null, row.calibration && `Calibration: ${row.calibration}`].filter(Boolean).join("\n");
}

const generating = rows.some(row => row.serving);
if (generating) {
  Object.assign(FIGURES.latency, { label: "First token", value: r => r.serving && r.serving.first_token_s, interval: r => r.serving && r.serving.first_token_interval_s, caption: "From the prompts' arrival to the first token of all of them; shorter is better. The axis is logarithmic." });
  Object.assign(FIGURES.throughput, { interval: r => r.serving && r.serving.tokens_per_s_interval, caption: "New tokens a second of the whole batch, the prompt's time included; more is better." });
  Object.assign(FIGURES.memory, { caption: "Weights, the batch's caches at their longest and the largest set of live values, on one chip." });
  Object.assign(FIGURES.energy, { value: r => r.energy_per_sample_j, interval: none, caption: "Of one new token. Where idle power is unknown this is the power cap for the whole time." });
  Object.assign(FIGURES.cost, { caption: "Dollars for a million new tokens at the listed price, with the target kept busy." });
}

// Bars of a chart until more are asked for; what was measured is always among them.
const BARS = 30;

const visible = () => rows.filter(row => (state.family === "all" || row.family === state.family) && `${row.target} ${row.title} ${row.backend} ${row.recipe}`.toLowerCase().includes(state.search));

// --- the parts of the page ---

const LIMITS = {
  max_latency_s: ["latency at most", seconds], min_throughput_per_s: ["throughput at least", rate], max_memory_bytes: ["memory at most", bytes], max_usd_per_million: ["a million at most", dollars],
  max_watts: ["power at most", value => scaled(value, "W")], max_drop: ["drop at most", value => `${digits(value * 100)}%`], max_first_token_s: ["first token within", seconds],
};

function drawHead() {
  const feasible = rows.filter(row => row.feasible).length, targets = new Set(rows.map(row => row.target)).size;
  const name = data.model || "Plan";
  document.title = `${name} · Trivium`;
  byId("title").textContent = data.model ? name : `Plan for ${data.objective}`;
  const shapes = Object.entries((data.workload || {}).shapes || {}).map(([k, v]) => `${k} ${v.join("×")}`);
  const dims = Object.entries((data.workload || {}).dims || {}).map(([k, v]) => `${k} = ${v}`);
  const limits = Object.entries(data.constraints || {}).map(([key, value]) => LIMITS[key] ? `${LIMITS[key][0]} ${LIMITS[key][1](value)}` : `${key.replaceAll("_", " ")} ${value}`);
  const [first, ...rest] = (data.answer || "").split(/(?<=\.) (?=[A-Z])/);
  byId("answer").replaceChildren(html("strong", { textContent: first }), rest.length ? ` ${rest.join(" ")}` : "");
  byId("answer").hidden = !data.answer;
  byId("subtitle").textContent = [...(shapes.length ? shapes : dims), ...limits, `${feasible} of ${rows.length} candidates on ${targets} targets can run it`].join(" · ");
}

function drawCards() {
  const cards = [["Fastest", "latency"], ["Cheapest", "cost"], ["Least energy", "energy"], ["Least memory", "memory"]];
  byId("summary").replaceChildren(...cards.map(([what, key]) => {
    const figure = FIGURES[key], known = rows.filter(row => row.feasible && figure.value(row));
    const best = known.sort((a, b) => figure.value(a) - figure.value(b))[0];
    return html("div", { className: "card" }, html("div", { className: "what", textContent: what }),
      html("div", { className: "figure", textContent: best ? figure.shown(figure.value(best)) : "–" }),
      html("div", { className: "who", textContent: best ? `${best.target} · ${best.backend}` : "unknown" }),
      html("div", { className: "what", textContent: best ? range(figure.interval(best), figure.shown) : "" }));
  }));
}

function drawFilters() {
  const families = ["all", ...new Set(rows.map(row => row.family))];
  byId("families").replaceChildren(...families.map(family => {
    const count = family === "all" ? rows.length : rows.filter(row => row.family === family).length;
    const button = html("button", { type: "button", textContent: `${family === "all" ? "All" : family.toUpperCase()} ${count}` });
    button.dataset.family = family;
    button.setAttribute("aria-pressed", String(state.family === family));
    button.addEventListener("click", () => { state.family = family; draw(); });
    return button;
  }));
}

function drawTabs() {
  const batches = new Set(rows.map(row => row.batch)).size;
  const more = [["pareto", "Pareto"], ["operators", "Operators"], ["roofline", "Roofline"], ...(batches > 1 ? [["batch", "By batch"]] : []), ...(generating ? [["context", "By context"]] : [])];
  const tabs = [...Object.entries(FIGURES).map(([key, figure]) => [key, figure.label]), ...more];
  byId("tabs").replaceChildren(...tabs.map(([key, label]) => {
    const button = html("button", { type: "button", textContent: label });
    button.setAttribute("role", "tab");
    button.dataset.tab = key;
    button.setAttribute("aria-selected", String(state.tab === key));
    button.addEventListener("click", () => { state.tab = key; draw(); });
    return button;
  }));
}

function drawChart() {
  const shown = visible();
  const families = [...new Set(shown.filter(row => row.feasible).map(row => row.family))];
  const keys = families.map(family => html("span", { className: family }, html("span", { className: "key fill" }), html("span", { className: "quiet", textContent: family.toUpperCase() })));
  const figure = FIGURES[state.tab];
  if (figure && shown.some(row => row.feasible && figure.measured(row))) keys.push(html("span", {}, html("span", { className: "key measured" }), "measured here"));
  byId("legend").replaceChildren(...keys);
  if (figure) {
    const ranked = shown.filter(row => row.feasible && figure.value(row)).sort((a, b) => (figure.more ? -1 : 1) * (figure.value(a) - figure.value(b)));
    const kept = state.all ? ranked : ranked.filter((row, index) => index < BARS || figure.measured(row));
    bars(byId("chart"), kept, figure, tip);
    if (ranked.length > BARS) {
      const button = html("button", { type: "button", className: "more", textContent: state.all ? `Only the first ${BARS}` : `All ${ranked.length}` });
      button.addEventListener("click", () => { state.all = !state.all; drawChart(); });
      byId("chart").append(button);
    }
    const silent = shown.filter(row => row.feasible && !figure.value(row)).length;
    byId("caption").textContent = figure.caption + (silent ? ` Unknown for ${silent} more.` : "");
    return;
  }
  const choose = id => { state.chosen = id; drawChart(); };
  const captions = { pareto: drawPareto, operators: drawOperators, roofline: drawRoofline, batch: drawBatch, context: drawContext };
  byId("caption").textContent = captions[state.tab](byId("chart"), shown.filter(row => row.feasible && row.latency_s), choose);
}

const nameOf = row => `${row.target}/${row.backend}/${row.recipe}` + (row.batch > 1 ? `/batch ${row.batch}` : "");

function drawRoofline(parent, shown, choose) {
  const active = roofline(parent, shown, state.chosen, tip, choose);
  return active ? `The line is the roof of ${active.target} at its fastest arithmetic; the large dot is the whole model on it, the small ones its costliest kernels. Select another dot for its roof.` : "";
}

// Latency against the figure chosen; what nothing beats is drawn strong.
function drawPareto(parent, shown) {
  const keys = ["cost", "energy", "memory"].filter(key => shown.some(row => FIGURES[key].value(row)));
  const axis = keys.includes(state.axis) ? state.axis : keys[0];
  const figure = FIGURES[axis];
  if (!figure) return "Only latencies are known here.";
  const known = shown.filter(figure.value);
  const points = known.map(row => ({ x: row.latency_s, y: figure.value(row), name: row.family, faint: !row.pareto, large: row.verdict === "best" || data.best === nameOf(row), tip: `${nameOf(row)}\n${seconds(row.latency_s)}, ${figure.shown(figure.value(row))}${row.pareto ? "\nnothing beats it" : ""}` }));
  plot(parent, [{ name: "cpu", points }], { hint: tip, label: "Pareto front", logX: true, logY: true, tickX: v => short(seconds(v)), tickY: figure.mark, x: "latency of a call", height: 380 });
  const buttons = keys.map(key => {
    const button = html("button", { type: "button", textContent: FIGURES[key].label });
    button.dataset.axis = key;
    button.setAttribute("aria-pressed", String(key === axis));
    button.addEventListener("click", () => { state.axis = key; drawChart(); });
    return button;
  });
  const group = html("div", {}, ...buttons);
  group.setAttribute("role", "group");
  parent.prepend(group);
  return `${figure.label} against latency; strong dots are on the front over latency, energy, cost, memory and the drop of accuracy. ${shown.length - known.length ? `Unknown for ${shown.length - known.length} more.` : ""}`;
}

function picker(shown, choose) {
  const select = html("select", { ariaLabel: "Candidate" }, ...shown.map(row => html("option", { value: row.id, textContent: nameOf(row), selected: row.id === state.chosen })));
  select.addEventListener("change", () => choose(Number(select.value)));
  return select;
}

function drawOperators(parent, shown, choose) {
  const listed = shown.filter(row => row.operators && row.operators.length);
  const active = listed.find(row => row.id === state.chosen) || listed[0];
  if (!active) { parent.replaceChildren(); return "No prediction here is made of operators."; }
  state.chosen = active.id;
  const total = active.operators.reduce((sum, one) => sum + one.seconds, 0);
  const figure = { label: "Time by operator", more: true, value: r => r.seconds, interval: none, measured: none, shown: v => `${seconds(v)} · ${(100 * v / total).toFixed(0)}%`, mark: v => short(seconds(v)), none: "", tip: r => `${r.target}\n${r.count} kernels, ${seconds(r.seconds)}\n${r.bound} bound` };
  bars(parent, active.operators.slice(0, 20).map(one => ({ ...one, target: one.op_type, family: active.family, feasible: true, recipe: "none" })), figure, tip);
  parent.prepend(picker(listed, choose));
  const rest = active.latency_s - total;
  return `Where the predicted ${seconds(active.latency_s)} go${rest > 0.005 * active.latency_s ? `; ${seconds(rest)} more are the call itself, transfers and links` : ""}. Fused operators stand together.`;
}

function drawBatch(parent, shown) {
  const groups = new Map();
  for (const row of shown) {
    const name = `${row.target}/${row.backend}/${row.recipe}`;
    groups.set(name, [...(groups.get(name) || []), row]);
  }
  const fastest = [...groups.values()].filter(g => g.length > 1).sort((a, b) => Math.max(...b.map(r => r.throughput_per_s)) - Math.max(...a.map(r => r.throughput_per_s))).slice(0, 8);
  const series = fastest.map(group => {
    const sorted = [...group].sort((a, b) => a.batch - b.batch);
    return { name: sorted[0].family, line: true, points: sorted.map(row => ({ x: row.batch, y: row.throughput_per_s, tip: `${nameOf(row)}\n${rate(row.throughput_per_s)}\n${seconds(row.latency_s)} a call` })) };
  });
  plot(parent, series, { hint: tip, label: "Throughput by batch", logX: true, logY: true, tickX: v => v.toFixed(0), tickY: v => short(rate(v)), x: "samples in one call", height: 360 });
  return "Samples a second by batch, of the eight with the highest throughput.";
}

// What the length of the context costs: tokens a second of a step, and the memory of the caches.
function drawContext(parent, shown) {
  const known = shown.filter(row => row.serving && row.serving.by_context.every(one => one.tokens_per_s));
  const last = row => row.serving.by_context[row.serving.by_context.length - 1].tokens_per_s;
  const fastest = known.sort((a, b) => last(b) - last(a)).slice(0, 8);
  const series = fastest.map(row => ({ name: row.family, line: true, points: row.serving.by_context.map(one => ({ x: one.context, y: one.tokens_per_s, tip: `${nameOf(row)}\n${one.context} tokens: ${short(rate(one.tokens_per_s))} tokens a second\n${seconds(one.step_s)} a step, caches ${bytes(one.cache_bytes)}` })) }));
  plot(parent, series, { hint: tip, label: "Tokens a second by context", logX: true, logY: true, tickX: v => v.toFixed(0), tickY: v => short(rate(v)), x: "tokens in each sequence", height: 360 });
  const row = fastest[0];
  return `Decoded tokens a second by the length of the sequences, of the eight quickest at the longest.${row ? ` The caches of a batch of ${row.batch} grow from ${bytes(row.serving.by_context[0].cache_bytes)} to ${bytes(row.serving.cache_bytes)}.` : ""}`;
}

const SERVED = [
  ["First token", r => r.serving && r.serving.first_token_s, seconds, r => r.serving && r.serving.first_token_interval_s], ["A token", r => r.serving && r.serving.step_s, seconds, r => r.serving && r.serving.step_interval_s],
  ["Tokens/s", r => r.throughput_per_s, value => scaled(value, "")], ["Caches", r => r.serving && r.serving.cache_bytes, bytes], ["Batch that fits", r => r.serving && r.serving.largest_batch, value => value === null ? "–" : String(value)],
  ["Memory", r => r.memory_bytes, bytes], ["J/million", r => r.energy_per_sample_j && r.energy_per_sample_j * 1e6, joules],
];
const COLUMNS = [
  ["Target", r => r.target], ["Backend", r => r.backend], ["Recipe", r => r.recipe], ["Batch", r => r.batch, String], ["Drop", r => r.quality && r.quality.drop, value => value === null ? "–" : value.toFixed(4)],
  ...(generating ? SERVED : [["Latency", r => r.latency_s, seconds, r => r.interval_s], ["Measured", r => r.measured && r.measured.latency_s, seconds, r => r.measured && r.measured.ci_s],
  ["Calls/s", r => r.throughput_per_s, value => scaled(value, "")], ["Memory", r => r.memory_bytes, bytes], ["Energy", r => r.energy_j, joules, r => r.energy_interval_j]]),
  ["$/million", r => r.usd_per_million, value => value === null ? "–" : digits(value), r => r.usd_per_million_interval], ["Bound", r => r.bound],
].filter(([name]) => (name !== "Measured" || rows.some(row => row.measured)) && (name !== "Recipe" || rows.some(row => row.recipe !== "none")) && (name !== "Batch" || rows.some(row => row.batch > 1)) && (name !== "Drop" || rows.some(row => row.quality)));

// Numbers stand to the right; a phone shows backend and recipe under the target's name.
const classOf = index => [COLUMNS[index][2] ? "number" : "", ["Backend", "Recipe"].includes(COLUMNS[index][0]) ? "named" : ""].join(" ").trim();

function compareBy(column) {
  const value = COLUMNS[column][1], sign = state.down ? -1 : 1;
  return (a, b) => {
    const x = value(a), y = value(b), unknown = v => v === null || v === undefined;
    if (unknown(x) || unknown(y)) return unknown(x) - unknown(y);
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
  };
}

function drawTable() {
  const head = html("tr", {}, ...COLUMNS.map(([label], index) => {
    const button = html("button", { type: "button", textContent: label });
    button.addEventListener("click", () => { state.down = state.sort === index && !state.down; state.sort = index; drawTable(); });
    const cell = html("th", { className: classOf(index), scope: "col" }, button);
    cell.setAttribute("aria-sort", state.sort === index ? (state.down ? "descending" : "ascending") : "none");
    return cell;
  }));
  byId("table").tHead.replaceChildren(head);
  const shown = visible();
  if (state.sort !== null) shown.sort(compareBy(state.sort));
  byId("table").tBodies[0].replaceChildren(...shown.flatMap(row => {
    const cells = COLUMNS.map(([label, value, show, interval], index) => {
      const text = show ? show(value(row) === undefined ? null : value(row)) : value(row) || "–";
      const cell = html("td", { className: classOf(index) }, index ? text : "");
      if (!index) cell.append(html("span", { className: "dot " + row.family }), text, html("span", { className: "range with", textContent: `${row.backend}, ${row.recipe}` }));
      if (interval && interval(row)) cell.append(html("span", { className: "range", textContent: range(interval(row), show) }));
      return cell;
    });
    const best = row.verdict === "best" || data.best === nameOf(row);
    const line = html("tr", { className: "candidate" + (row.feasible ? "" : " refused") + (best ? " best" : ""), tabIndex: 0 }, ...cells);
    const flip = () => { state.open.has(row.id) ? state.open.delete(row.id) : state.open.add(row.id); drawTable(); };
    line.addEventListener("click", flip);
    line.addEventListener("keydown", event => { if (event.key === "Enter") flip(); });
    const why = row.verdict && !best ? [html("tr", { className: "why" + (row.feasible ? "" : " refused") }, html("td", { colSpan: COLUMNS.length }, html("div", { textContent: reason(row) })))] : [];
    if (why.length) line.classList.add("told");
    return state.open.has(row.id) ? [line, ...why, detail(row)] : [line, ...why];
  }));
}

// Why a candidate of a plan lost, and what would have to change.
const reason = row => row.verdict + (row.wins_if ? `; would win if ${row.wins_if}` : "");

function detail(row) {
  const list = items => html("ul", {}, ...items.map(item => html("li", { textContent: item })));
  const cell = html("div", {}, html("strong", { textContent: row.title || row.target }));
  if (row.quality) cell.append(html("p", { textContent: row.quality.reason || `${row.quality.metric} ${digits(row.quality.value)} on ${row.quality.samples}, drop ${row.quality.drop.toFixed(4)}` }));
  if (row.latency_s) cell.append(pricing(row));
  if (row.refusals.length) cell.append(list(row.refusals));
  if (row.measured) cell.append(html("p", { textContent: `Measured: median ${seconds(row.measured.latency_s)} (${range(row.measured.ci_s, seconds)}), ${row.measured.where}` }));
  if (row.calibration) cell.append(html("p", { textContent: `Calibrated on ${row.calibration}.` }));
  const resources = Object.entries(row.resources || {});
  if (resources.length) cell.append(html("p", { textContent: resources.map(([k, v]) => `${k} ${Math.round(v).toLocaleString("en")}`).join(" · ") }));
  const kernels = row.roofline ? row.roofline.kernels : [];
  if (kernels.length) {
    cell.append(html("table", {}, html("tbody", {}, ...kernels.slice(0, 8).map(kernel => html("tr", {},
      html("td", { textContent: kernel.op_type.length > 48 ? kernel.op_type.slice(0, 47) + "…" : kernel.op_type }), html("td", { className: "number", textContent: seconds(kernel.seconds) }),
      html("td", { className: "number", textContent: scaled(kernel.operations, "op") }), html("td", { className: "number", textContent: bytes(kernel.bytes) }), html("td", { textContent: kernel.bound }))))));
  }
  if (row.notes.length) cell.append(list(row.notes));
  return html("tr", { className: "open" }, html("td", { className: "detail", colSpan: COLUMNS.length }, cell));
}

// What a million samples cost at a price that the reader gives.
function pricing(row) {
  const shown = html("span", {}), input = html("input", { type: "number", min: 0, step: "any", value: row.usd_per_hour === null ? "" : row.usd_per_hour, ariaLabel: "Dollars an hour" });
  const show = () => { shown.textContent = input.value === "" ? " – a price would tell what a million cost" : ` an hour${row.chips > 1 ? " of a chip" : ""}: $${digits(Number(input.value) * row.chips * row.latency_s / (row.serving ? row.batch * row.serving.new_tokens : row.batch) / 3600 * 1e6)} a million`; };
  input.addEventListener("input", show);
  for (const name of ["click", "keydown"]) input.addEventListener(name, event => event.stopPropagation());
  show();
  return html("p", { className: "pricing" }, "At $", input, shown, row.price_source ? html("span", { className: "range", textContent: row.price_source }) : null);
}

function drawRefused() {
  const refused = visible().filter(row => !row.feasible);
  byId("refused").hidden = !refused.length;
  byId("refused").querySelector("dl").replaceChildren(...refused.flatMap(row => [
    html("dt", { textContent: `${row.target} with ${row.backend}` + (row.recipe === "none" ? "" : `, ${row.recipe}`) }),
    ...row.refusals.slice(0, 3).map(reason => html("dd", { textContent: reason })),
    row.refusals.length > 3 ? html("dd", { textContent: `and ${row.refusals.length - 3} more` }) : null,
  ].filter(Boolean)));
}

function draw() {
  drawFilters();
  drawTabs();
  drawChart();
  drawTable();
  drawRefused();
}

byId("search").addEventListener("input", event => { state.search = event.target.value.toLowerCase(); draw(); });
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawChart(); } });
if (FIGURES[data.objective]) state.tab = data.objective;
drawHead();
drawCards();
draw();
