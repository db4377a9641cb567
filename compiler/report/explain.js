// What a recipe costs where: cards, noise along the graph, layers alone, mixes of precision, tables.

const state = { recipe: 0, open: new Set() };
const decibels = noise => noise === null || noise === undefined ? null : noise === 0 ? Infinity : -10 * Math.log10(noise);
const db = value => value === null || value === undefined ? "–" : value === Infinity ? "exact" : value.toFixed(1) + " dB";
const points = value => value === null || value === undefined ? "–" : (Math.abs(value) < 5e-5 ? 0 : value).toFixed(4);

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
  plot(byId("path"), [{ name: "accent", line: true, points: line }, { name: "tpu", points: dots }], { hint: tip, label: "Noise along the graph", tickY: v => v.toFixed(0) + " dB", x: "from the input to the output", none: "No value differs." });
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
  plot(byId("front"), [{ name: "accent", points: dots }], { hint: tip, label: "Mixes of precision", tickX: v => short(shown(v)), tickY: v => v.toFixed(3), x: memory ? "weights" : `predicted on ${budget.target} by ${budget.backend}`, lines: [{ y: budget.max_drop, label: "the limit" }], showY: [0, budget.max_drop] });
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

// --- a prompt ---

const shown = text => text.replace(/\n/g, "\u21b5") || "\u2205";

// The prompt's tokens, coloured by what they did: one colour for, the other against.
function drawTokens() {
  const found = data.gradients, kinds = [["integrated", "Integrated gradients"], ["gradient_x_input", "Gradient times input"]];
  const kind = state.kind || "integrated", values = found ? found[kind] : data.tokens.map(() => 0);
  const most = Math.max(...values.map(Math.abs), 1e-12);
  const spans = data.tokens.map((text, index) => {
    const span = html("span", { className: "token", textContent: shown(text), tabIndex: 0 });
    const share = Math.round(70 * Math.abs(values[index]) / most);
    span.style.background = `color-mix(in srgb, var(${values[index] >= 0 ? "--accent" : "--measured"}) ${share}%, transparent)`;
    tip(span, () => `${data.tokens[index]}\n${found ? values[index].toFixed(4) : ""}`);
    return span;
  });
  const buttons = found ? kinds.map(([key, label]) => {
    const button = html("button", { type: "button", textContent: label });
    button.dataset.kind = key;
    button.setAttribute("aria-pressed", String(key === kind));
    button.addEventListener("click", () => { state.kind = key; drawTokens(); });
    return button;
  }) : [];
  const group = html("div", {}, ...buttons);
  group.setAttribute("role", "group");
  const next = html("p", { className: "quiet small", textContent: `Next: "${shown(data.predicted.text)}", probability ${digits(data.predicted.probability)}.` + (found ? ` Blue tokens raised its logit of ${digits(found.logit)}, red ones lowered it; integrated gradients miss ${(100 * found.missing).toFixed(1)}% of the difference.` : "") });
  byId("tokens").replaceChildren(group, html("p", { className: "tokens" }, ...spans), next);
}

// All heads of a layer as small maps, row = the token that looks, column = what it looks at.
function drawHeads() {
  const layers = data.attention;
  if (!layers.length) { byId("heads").replaceChildren(); return; }
  const at = Math.min(state.layer || 0, layers.length - 1), count = data.tokens.length;
  const select = html("select", { ariaLabel: "Layer" }, ...layers.map((one, index) => html("option", { value: index, textContent: one.layer, selected: index === at })));
  select.addEventListener("change", () => { state.layer = Number(select.value); drawHeads(); });
  const maps = layers[at].heads.map((head, number) => {
    const canvas = html("canvas", { width: count, height: count, className: "map" });
    const context = canvas.getContext("2d"), colour = getComputedStyle(document.documentElement).getPropertyValue("--accent");
    context.fillStyle = colour;
    head.forEach((row, y) => row.forEach((value, x) => { context.globalAlpha = Math.min(1, value); context.fillRect(x, y, 1, 1); }));
    const place = event => {
      const box = canvas.getBoundingClientRect();
      return [Math.floor((event.clientX - box.left) / box.width * count), Math.floor((event.clientY - box.top) / box.height * count)].map(v => Math.max(0, Math.min(count - 1, v)));
    };
    let text = `head ${number}`;
    canvas.addEventListener("pointermove", event => { const [x, y] = place(event); text = `head ${number}\n"${shown(data.tokens[y])}" looks at "${shown(data.tokens[x])}": ${head[y][x].toFixed(3)}`; });
    tip(canvas, () => text);
    return html("figure", {}, canvas, html("figcaption", { className: "quiet small", textContent: `head ${number}` }));
  });
  byId("heads").replaceChildren(html("h2", { textContent: "Attention" }), select, html("div", { className: "maps" }, ...maps), html("p", { className: "quiet small", textContent: "Rows are the tokens that look, columns what they look at; darker is more. Every row sums to one." }));
}

function drawPrompt() {
  document.title = `${data.model} · Trivium`;
  byId("title").textContent = data.model;
  byId("subtitle").textContent = `${data.tokens.length} tokens`;
  for (const panel of document.querySelectorAll("main > section")) panel.hidden = panel.id !== "prompt";
  drawTokens();
  drawHeads();
}

function draw() {
  if (data.kind === "prompt") { drawPrompt(); return; }
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
