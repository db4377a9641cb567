// What the pages share: elements, tooltips, the theme, tables that sort, the data as a file.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);

function html(name, properties, ...children) {
  const element = Object.assign(document.createElement(name), properties || {});
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

// "9.3 to 56 µs", the unit once where both ends share it.
function range(pair, show) {
  if (!pair) return "";
  const [low, high] = pair.map(show), unit = text => text.replace(/^[\d.e+-]+/, "");
  return `${unit(low) && unit(low) === unit(high) ? low.slice(0, -unit(low).length) : low} to ${high}`;
}

const none = () => null;

// --- tooltips ---

const tipBox = byId("tip");
function tip(element, text) {
  const show = event => {
    tipBox.textContent = text();
    tipBox.hidden = false;
    const box = element.getBoundingClientRect();
    const px = event.clientX || box.left + box.width / 2, py = event.clientY || box.bottom;
    tipBox.style.left = Math.max(8, Math.min(px + 14, innerWidth - tipBox.offsetWidth - 8)) + "px";
    tipBox.style.top = (py + 18 + tipBox.offsetHeight > innerHeight ? Math.max(8, py - tipBox.offsetHeight - 12) : py + 18) + "px";
  };
  for (const name of ["pointerenter", "pointermove", "focus"]) element.addEventListener(name, show);
  for (const name of ["pointerleave", "blur"]) element.addEventListener(name, () => { tipBox.hidden = true; });
}

// --- tables ---

// A table whose headings sort; columns are [label, value, shown]; the unknown come last either way.
function sortable(table, columns, items, draw) {
  const state = table.sorting || (table.sorting = { by: null, down: false });
  const unknown = value => value === null || value === undefined;
  const head = html("tr", {}, ...columns.map(([label, , shown], index) => {
    const button = html("button", { type: "button", textContent: label });
    button.addEventListener("click", () => { state.down = state.by === index && !state.down; state.by = index; sortable(table, columns, items, draw); });
    const cell = html("th", { className: shown ? "number" : "", scope: "col" }, button);
    cell.setAttribute("aria-sort", state.by === index ? (state.down ? "descending" : "ascending") : "none");
    return cell;
  }));
  table.tHead.replaceChildren(head);
  const sorted = [...items];
  if (state.by !== null) {
    const value = columns[state.by][1], sign = state.down ? -1 : 1;
    sorted.sort((a, b) => {
      const x = value(a), y = value(b);
      if (unknown(x) || unknown(y)) return unknown(x) - unknown(y);
      return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
    });
  }
  table.tBodies[0].replaceChildren(...sorted.flatMap(item => {
    const cells = columns.map(([, value, shown]) => html("td", { className: shown ? "number" : "", textContent: shown ? shown(value(item), item) : value(item) || "–" }));
    const line = html("tr", { className: "candidate" }, ...cells);
    return draw ? draw(line, item) : [line];
  }));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
byId("download").addEventListener("click", event => {
  event.target.href = "data:application/json;charset=utf-8," + encodeURIComponent(JSON.stringify(data, null, 2));
  event.target.download = `${(data.model || data.kind || "plan").replace(/\.\w+$/, "")}.json`;
});
