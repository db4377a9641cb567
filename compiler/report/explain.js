// What a recipe costs where: cards, noise along the graph, layers alone, mixes of precision, tables.

const state = { recipe: 0, open: new Set() };
const decibels = noise => noise === null || noise === undefined ? null : noise === 0 ? Infinity : -10 * Math.log10(noise);
const db = value => value === null || value === undefined ? "–" : value === Infinity ? "exact" : value.toFixed(1) + " dB";
const points = value => value === null || value === undefined ? "–" : (Math.abs(value) < 5e-5 ? 0 : value).toFixed(4);

// Dots and lines over linear or logarithmic axes: series of {points: [{x, y, tip}], line, name}.
function plot(parent, series, axes) {
  parent.replaceChildren();
  const all = series.flatMap(one => one.points);
  if (!all.length) {
    parent.append(html("p", { className: "quiet", textContent: axes.none || "Nothing to show." }));
    return;
  }
  const width = Math.max(parent.clientWidth, 300), height = axes.height || 280;
  const left = 64, right = 14, top = 12, bottom = 40;
  const scale = (values, from, to, log) => {
    const at = log ? Math.log10 : v => v;
    let low = Math.min(...values.map(at)), high = Math.max(...values.map(at));
    const pad = (high - low || Math.abs(high) || 1) * .06;
    low -= pad; high += pad;
    const place = v => from + (at(v) - low) / (high - low) * (to - from);
    const marks = [0, 1, 2, 3, 4].map(i => { const v = low + (high - low) * i / 4; return log ? 10 ** v : v; });
    return { place, marks };
  };
  const x = scale([...all.map(p => p.x), ...(axes.showX || [])], left, width - right, axes.logX);
  const y = scale([...all.map(p => p.y), ...(axes.showY || [])], height - bottom, top, axes.logY);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": axes.label }, parent);
  for (const mark of x.marks) {
    svg("line", { x1: x.place(mark), x2: x.place(mark), y1: top, y2: height - bottom, class: "grid" }, root);
    if (axes.tickX) svg("text", { x: x.place(mark), y: height - bottom + 16, "text-anchor": "middle", class: "quiet" }, root, axes.tickX(mark));
  }
  for (const mark of y.marks) {
    svg("line", { x1: left, x2: width - right, y1: y.place(mark), y2: y.place(mark), class: "grid" }, root);
    svg("text", { x: left - 8, y: y.place(mark) + 4, "text-anchor": "end", class: "quiet" }, root, axes.tickY(mark));
  }
  if (axes.x) svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle", class: "quiet" }, root, axes.x);
  for (const line of axes.lines || []) {
    svg("line", { x1: left, x2: width - right, y1: y.place(line.y), y2: y.place(line.y), class: "limit" }, root);
    svg("text", { x: width - right, y: y.place(line.y) - 5, "text-anchor": "end", class: "quiet" }, root, line.label);
  }
  for (const one of series) {
    if (one.line) svg("path", { d: one.points.map((p, i) => `${i ? "L" : "M"}${x.place(p.x)} ${y.place(p.y)}`).join(""), class: "stroke " + one.name, fill: "none", "stroke-width": 2 }, root);
    if (one.line && one.points.length > 150) continue;
    for (const p of one.points) {
      const dot = svg("circle", { cx: x.place(p.x), cy: y.place(p.y), r: p.large ? 7 : one.line ? 2.5 : 4.5, class: "fill " + (p.name || one.name), opacity: p.faint ? .35 : .9, tabindex: 0 }, root);
      tip(dot, () => p.tip);
    }
  }
}

function drawHead(blame) {
  document.title = `${data.model} · Trivium`;
  byId("title").textContent = data.model;
  byId("subtitle").textContent = `${data.metric} of the source ${digits(data.baseline.value)} on ${data.baseline.samples} · layers judged on ${data.judged_on}`;
  byId("recipes").replaceChildren(...data.recipes.map((one, index) => {
    const button = html("button", { type: "button", textContent: one.recipe });
    button.dataset.recipe = index;
    button.setAttribute("aria-pressed", String(index === state.recipe));
    button.addEventListener("click", () => { state.recipe = index; state.open.clear(); draw(); });
    return button;
  }));
  const worst = [...blame.layers].sort((a, b) => (b.output_noise || 0) - (a.output_noise || 0))[0];
  const cards = [
    [data.metric, digits(blame.value), `drop ${points(blame.drop)}`],
    ["Signal to noise at the output", db(decibels(blame.output_noise)), "all layers lossy"],
    ["Costliest layer", worst ? worst.name : "–", worst ? `${worst.op_type}, ${db(decibels(worst.output_noise))} alone` : ""],
    ["Changed layers", String(blame.layers.length), `${blame.passes.map(one => one.name).join(", ")}`],
  ];
  byId("summary").replaceChildren(...cards.map(([what, figure, who]) => html("div", { className: "card" },
    html("div", { className: "what", textContent: what }), html("div", { className: "figure", textContent: figure }), html("div", { className: "who", textContent: who }))));
}

function drawPath(blame) {
  const at = new Map(blame.path.map((one, index) => [one.value, index]));
  const line = blame.path.map((one, index) => ({ x: index, y: decibels(one.noise), tip: `${one.value}\n${db(decibels(one.noise))}` })).filter(p => Number.isFinite(p.y));
  const order = new Map();
  let seen = 0;
  for (const layer of blame.layers) order.set(layer.name, at.has(layer.name) ? at.get(layer.name) : Math.round(blame.path.length * seen++ / blame.layers.length));
  const dots = blame.layers.map(layer => ({ x: order.get(layer.name), y: decibels(layer.local_noise), tip: `${layer.name} (${layer.op_type})\nalone ${db(decibels(layer.local_noise))}` })).filter(p => Number.isFinite(p.y));
  plot(byId("path"), [{ name: "accent", line: true, points: line }, { name: "tpu", points: dots }], { label: "Noise along the graph", tickY: v => v.toFixed(0) + " dB", x: "from the input to the output", none: "No value differs." });
}

const noiseFigure = {
  more: true, value: r => r.output_noise, interval: none, measured: none, shown: v => db(decibels(v)), mark: v => v.toExponential(0),
  none: "No layer alone disturbs the output.", tip: r => `${r.target}\n${r.op_type}\n${db(decibels(r.output_noise))} at the output\ndrop ${points(r.drop)}`,
};

function drawLayers(blame) {
  const rows = [...blame.layers].filter(layer => layer.output_noise).sort((a, b) => b.output_noise - a.output_noise).slice(0, 30);
  bars(byId("layers"), rows.map(layer => ({ ...layer, target: layer.name, backend: layer.op_type, recipe: "none", feasible: true, family: "accent" })), noiseFigure, tip);
}

function drawBudget() {
  const budget = data.budget;
  byId("budget").hidden = !budget;
  if (!budget) return;
  const memory = budget.objective === "memory", x = p => memory ? p.weights_bytes : p.seconds, shown = memory ? bytes : seconds;
  const what = p => Object.entries(p.layers).map(([name, count]) => `${count} ${name}`).join(", ") || "all float";
  const dots = budget.front.filter(x).map(p => ({ x: x(p), y: p.drop, large: p.best, faint: !p.pareto && !p.best, name: p.best ? "measured" : "accent", tip: `${what(p)}\n${shown(x(p))}, ${data.metric} ${digits(p.value)}\ndrop ${points(p.drop)}${p.best ? "\nchosen" : ""}` }));
  plot(byId("front"), [{ name: "accent", points: dots }], { label: "Mixes of precision", tickX: v => short(shown(v)), tickY: v => v.toFixed(3), x: memory ? "weights" : `predicted on ${budget.target} by ${budget.backend}`, lines: [{ y: budget.max_drop, label: "the limit" }], showY: [0, budget.max_drop] });
  const verified = budget.verified;
  byId("verdict").textContent = [verified ? `Verified for real: ${data.metric} ${digits(verified.value)} on ${verified.samples}, drop ${points(verified.drop)}.` : "No mix is better than float within the limit.", ...budget.notes].join(" ");
  byId("toml").textContent = budget.recipe || "";
  byId("toml").parentElement.hidden = !budget.recipe;
}

function drawTables(blame) {
  const columns = [
    ["Layer", r => r.name], ["Operator", r => r.op_type], ["Output SNR", r => decibels(r.output_noise), db], ["Own SNR", r => decibels(r.local_noise), db],
    ["With all", r => decibels(r.cumulative_noise), db], ["Drop alone", r => r.drop, points],
    ["Mix", r => ((data.budget || {}).layers || {})[r.name] || (data.budget && data.budget.best ? "float" : null)],
  ].filter(([name]) => name !== "Mix" || data.budget);
  sortable(byId("table"), columns, blame.layers, (line, layer) => {
    line.tabIndex = 0;
    const flip = () => { state.open.has(layer.name) ? state.open.delete(layer.name) : state.open.add(layer.name); drawTables(blame); };
    line.addEventListener("click", flip);
    line.addEventListener("keydown", event => { if (event.key === "Enter") flip(); });
    if (!state.open.has(layer.name)) return [line];
    const tensors = layer.tensors.map(t => html("tr", {}, html("td", { textContent: t.name }), html("td", { textContent: t.weight ? "weight" : "activation" }), html("td", { textContent: t.stored }), html("td", { className: "number", textContent: db(decibels(t.noise)) })));
    return [line, html("tr", { className: "open" }, html("td", { className: "detail", colSpan: columns.length }, html("div", {}, html("table", {}, html("tbody", {}, ...tensors)))))];
  });
  sortable(byId("passes"), [["After the pass", r => r.name], ["Output SNR", r => decibels(r.output_noise), db], [data.metric, r => r.value, digits], ["Drop", r => r.drop, points]], blame.passes);
}

function draw() {
  const blame = data.recipes[state.recipe];
  drawHead(blame);
  drawPath(blame);
  drawLayers(blame);
  drawBudget();
  drawTables(blame);
  byId("notes").textContent = [...data.notes, ...blame.notes].join(" · ");
}

let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
draw();
