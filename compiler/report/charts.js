"use strict";
// Drawing: bars with intervals on a logarithmic axis, and the roofline. No library.

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, parent, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function digits(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  return value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
}

const PREFIXES = [["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3], ["", 1], ["m", 1e-3], ["µ", 1e-6], ["n", 1e-9], ["p", 1e-12]];

function scaled(value, unit, largest) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0 " + unit;
  const usable = PREFIXES.filter(p => p[1] <= (largest || 1e15));
  const found = usable.find(p => Math.abs(value) >= p[1] * 0.9995) || usable[usable.length - 1];
  return (digits(value / found[1]) + " " + found[0] + unit).trim();
}

// Without the zeros that only fill up three digits: "10.0 ms" on an axis is "10 ms".
const short = text => text.replace(/(\.\d*?)0+(?=\D|$)/, "$1").replace(/\.(?=\D|$)/, "");

const seconds = value => scaled(value, "s", 1);
const joules = value => scaled(value, "J");
const rate = value => scaled(value, "/s");
const dollars = value => value === null || value === undefined ? "–" : "$" + digits(value);

function bytes(value) {
  if (value === null || value === undefined) return "–";
  for (const [unit, factor] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= factor) return digits(value / factor) + " " + unit;
  }
  return value.toFixed(0) + " B";
}

function decades(low, high) {
  const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
  const step = Math.max(1, Math.ceil((to - from) / 7)), marks = [];
  for (let power = from; power <= to; power += step) marks.push(10 ** power);
  return marks;
}

// Horizontal bars, one for each row; whiskers are intervals, a diamond is a measurement.
function bars(parent, rows, figure, tip) {
  parent.replaceChildren();
  const shown = rows.filter(row => row.feasible && figure.value(row));
  if (!shown.length) {
    parent.append(Object.assign(document.createElement("p"), { className: "quiet", textContent: figure.none }));
    return;
  }
  const width = Math.max(parent.clientWidth, 300), narrow = width < 560;
  const told = row => figure.shown(figure.value(row)) + (figure.measured(row) ? `, measured ${figure.shown(figure.measured(row))}` : "");
  const left = narrow ? 8 : 232, right = narrow ? 8 : shown.some(figure.measured) ? 190 : 84, line = narrow ? 40 : 26, top = 22;
  shown.sort((a, b) => (figure.more ? -1 : 1) * (figure.value(a) - figure.value(b)));
  const all = shown.flatMap(row => [figure.value(row), ...(figure.interval(row) || []), ...(figure.measured(row) ? [figure.measured(row)] : [])]).filter(v => v > 0);
  const marks = decades(Math.min(...all) / 1.5, Math.max(...all));
  const low = Math.log10(marks[0]), high = Math.max(Math.log10(Math.max(...all)), low + 1);
  const x = value => left + (Math.log10(Math.max(value, marks[0])) - low) / (high - low) * (width - left - right);
  const height = top + shown.length * line + 6;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": figure.label }, parent);
  for (const mark of marks) {
    if (x(mark) > width - right + 1) continue;
    svg("line", { x1: x(mark), x2: x(mark), y1: top - 4, y2: height - 4, class: "grid" }, root);
    svg("text", { x: x(mark), y: 12, "text-anchor": "middle", class: "quiet" }, root, figure.mark(mark));
  }
  shown.forEach((row, index) => {
    const y = top + index * line, value = figure.value(row), interval = figure.interval(row), measured = figure.measured(row);
    const group = svg("g", { class: row.family, tabindex: 0 }, root);
    const name = row.target + (row.several ? ` · ${row.backend}` : "") + (row.recipe === "none" ? "" : ` · ${row.recipe}`) + (row.batch > 1 ? ` · ${row.batch}` : "");
    const bar = narrow ? y + 18 : y + 5;
    svg("rect", { x: 0, y, width, height: line, fill: "transparent" }, group);
    if (narrow) {
      // The figure stands at the end of the line; what is left of it is the name's.
      const room = Math.floor((width - 24) / 6.6) - told(row).length;
      svg("text", { x: left, y: y + 13 }, group, name.length > room ? name.slice(0, room - 1) + "…" : name);
    } else svg("text", { x: left - 10, y: y + 17, "text-anchor": "end" }, group, name.length > 34 ? name.slice(0, 33) + "…" : name);
    svg("rect", { x: left, y: bar, width: Math.max(x(value) - left, 2), height: 15, rx: 2, class: "fill", opacity: .85 }, group);
    let end = x(value);
    if (interval && interval[1] > 0) {
      const from = x(interval[0]), to = x(interval[1]);
      svg("path", { d: `M${from} ${bar + 3}v9M${from} ${bar + 7.5}H${to}M${to} ${bar + 3}v9`, class: "whisker", fill: "none" }, group);
      end = Math.max(end, to);
    }
    if (measured) {
      const at = x(measured);
      svg("path", { d: `M${at} ${bar + 1}l6.5 6.5l-6.5 6.5l-6.5 -6.5z`, class: "measured" }, group);
      end = Math.max(end, at + 7);
    }
    if (narrow) svg("text", { x: width - right, y: y + 13, "text-anchor": "end" }, group, told(row));
    else svg("text", { x: end + 8, y: bar + 12 }, group, told(row));
    tip(group, () => figure.tip(row));
  });
}

// Every target's roof, the whole model on each, and the kernels of the chosen one.
function roofline(parent, rows, chosen, tip, choose) {
  parent.replaceChildren();
  const shown = rows.filter(row => row.feasible && row.roofline && row.roofline.rate && row.roofline.peak_ops && row.roofline.memory_bytes_per_s);
  if (!shown.length) {
    parent.append(Object.assign(document.createElement("p"), { className: "quiet", textContent: "No target here has a known roof." }));
    return;
  }
  const active = shown.find(row => row.id === chosen) || shown[0];
  const kernels = active.roofline.kernels.filter(k => k.operations > 0 && k.bytes > 0 && k.seconds > 0)
    .map(k => ({ ...k, x: k.operations / k.bytes, y: k.operations / k.seconds }));
  const points = shown.map(row => ({ row, x: row.roofline.operations / row.roofline.bytes, y: row.roofline.rate }));
  const ridges = shown.map(row => row.roofline.peak_ops / row.roofline.memory_bytes_per_s);
  const xs = [...points.map(p => p.x), ...kernels.map(k => k.x), ...ridges], ys = [...points.map(p => p.y), ...kernels.map(k => k.y), ...shown.map(r => r.roofline.peak_ops)];
  const width = Math.max(parent.clientWidth, 300), height = Math.min(460, Math.max(300, width * .55));
  const left = 62, right = 12, top = 10, bottom = 44;
  const x0 = Math.log10(Math.min(...xs)) - .3, x1 = Math.log10(Math.max(...xs)) + .5, y0 = Math.log10(Math.min(...ys)) - .3, y1 = Math.log10(Math.max(...ys)) + .2;
  const x = v => left + (Math.log10(v) - x0) / (x1 - x0) * (width - left - right);
  const y = v => height - bottom - (Math.log10(v) - y0) / (y1 - y0) * (height - top - bottom);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Roofline" }, parent);
  const clip = svg("clipPath", { id: "plot" }, svg("defs", {}, root));
  svg("rect", { x: left, y: top, width: width - left - right, height: height - top - bottom }, clip);
  for (const mark of decades(10 ** x0, 10 ** x1)) {
    if (x(mark) < left || x(mark) > width - right) continue;
    svg("line", { x1: x(mark), x2: x(mark), y1: top, y2: height - bottom, class: "grid" }, root);
    svg("text", { x: x(mark), y: height - bottom + 16, "text-anchor": "middle", class: "quiet" }, root, mark >= 1 ? mark.toLocaleString("en") : String(Number(mark.toPrecision(1))));
  }
  for (const mark of decades(10 ** y0, 10 ** y1)) {
    if (y(mark) < top || y(mark) > height - bottom) continue;
    svg("line", { x1: left, x2: width - right, y1: y(mark), y2: y(mark), class: "grid" }, root);
    svg("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end", class: "quiet" }, root, short(scaled(mark, "op/s")));
  }
  svg("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle", class: "quiet" }, root, "operations for each byte moved");
  const plot = svg("g", { "clip-path": "url(#plot)" }, root);
  for (const row of [...shown.filter(r => r !== active), active]) {
    const peak = row.roofline.peak_ops, bandwidth = row.roofline.memory_bytes_per_s, ridge = peak / bandwidth;
    const d = `M${x(10 ** x0)} ${y(bandwidth * 10 ** x0)}L${x(ridge)} ${y(peak)}L${x(10 ** x1)} ${y(peak)}`;
    svg("path", { d, class: "roof stroke " + row.family + (row === active ? " on" : "") }, plot);
  }
  for (const kernel of kernels) {
    const dot = svg("circle", { cx: x(kernel.x), cy: y(kernel.y), r: 4, class: "fill " + active.family, opacity: .5 }, plot);
    tip(dot, () => `${kernel.op_type}\n${kernel.name}\n${seconds(kernel.seconds)}, ${kernel.bound} bound`);
  }
  for (const { row, x: px, y: py } of points) {
    const dot = svg("circle", { cx: x(px), cy: y(py), r: row === active ? 7 : 5, class: "fill " + row.family, tabindex: 0, role: "button", "aria-label": row.target, opacity: row === active ? 1 : .6 }, plot);
    dot.style.cursor = "pointer";
    dot.addEventListener("click", () => choose(row.id));
    dot.addEventListener("keydown", event => { if (event.key === "Enter") choose(row.id); });
    tip(dot, () => `${row.title || row.target}\n${scaled(py, "op/s")} of ${scaled(row.roofline.peak_ops, "op/s")}\n${row.bound} bound`);
  }
  return active;
}

// Dots and lines over linear or logarithmic axes: series of {points: [{x, y, tip}], line, name}.
function plot(parent, series, axes) {
  parent.replaceChildren();
  const all = series.flatMap(one => one.points);
  if (!all.length) {
    parent.append(Object.assign(document.createElement("p"), { className: "quiet", textContent: axes.none || "Nothing to show." }));
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
      const dot = svg("circle", { cx: x.place(p.x), cy: y.place(p.y), r: p.large ? 7 : one.line ? 3 : 4.5, class: "fill " + (p.name || one.name), opacity: p.faint ? .3 : .9, tabindex: 0 }, root);
      if (p.label) svg("text", { x: x.place(p.x) + 9, y: y.place(p.y) + 4, class: "quiet" }, root, p.label);
      axes.hint(dot, () => p.tip);
    }
  }
}
