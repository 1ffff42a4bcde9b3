"use strict";
// The page's own behaviour: sorted tables, a filter, chosen columns, and charts drawn from the data block.
// Text from runs is only ever set as text.

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#2f7ed8", "#e8710a", "#2ca02c", "#d62f3a", "#9467bd", "#a0695a", "#d85fb3", "#808a94", "#a8a212", "#17a3b5"];
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];

function make(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

function html(name, className, text, parent) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function shown(value, percent) {
  if (percent) return (100 * value).toFixed(1) + " %";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

// ---- scales ----

function niceStep(span, count) {
  const rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((step) => step * power >= rough);
}

function linearTicks(low, high, count) {
  const step = niceStep(high - low, count), ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high, count) {
  const all = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of [1, 2, 5]) all.push(Number((factor * 10 ** power).toPrecision(6)));
  const inside = (ticks) => ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  const decades = inside(all.filter((_, i) => i % 3 === 0));
  if (decades.length >= 3) {
    const every = Math.ceil(decades.length / count);
    return decades.filter((_, i) => i % every === 0);
  }
  return inside(all).length >= 2 ? inside(all) : linearTicks(low, high, count);
}

function scale(values, from, to, isLog, count) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  if (low === high) { const pad = isLog ? low * 0.5 : Math.abs(low) * 0.5 || 1; low -= pad; high += pad; }
  const bend = isLog ? Math.log : (value) => value;
  const place = (value) => from + ((bend(value) - bend(low)) / (bend(high) - bend(low))) * (to - from);
  return { place, ticks: isLog ? logTicks(low, high, count) : linearTicks(low, high, count) };
}

// ---- charts ----

class Chart {
  constructor(root, figure) {
    Object.assign(this, { root, figure, front: null });
    const positive = (curve) => curve.y.concat(curve.low || []).every((value) => value > 0);
    this.canLog = figure.curves.every(positive);
    this.isLog = figure.logY && this.canLog;
    this.visible = figure.curves.map((curve) => curve.first);
    this.tools();
    this.svg = make("svg", { role: "img", "aria-label": figure.title }, root);
    this.tip = html("div", "tip hidden", "", root);
    this.legend();
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    new ResizeObserver(() => { if (root.clientWidth !== this.width) this.draw(); }).observe(root);
    this.draw();
  }

  tools() {
    const tools = html("div", "tools", "", this.root);
    html("span", "faint", this.figure.y, tools);
    for (const [text, value] of [["show all", true], ["hide all", false]])
      html("button", "", text, tools).addEventListener("click", () => {
        this.visible.fill(value);
        this.update();
      });
    if (!this.canLog) return;
    const label = html("label", "", "", tools), box = html("input", "", "", label);
    box.type = "checkbox";
    box.checked = this.isLog;
    label.append(" logarithmic");
    box.addEventListener("change", () => { this.isLog = box.checked; this.draw(); });
  }

  style(number) {
    return { stroke: COLOURS[number % COLOURS.length], "stroke-dasharray": DASHES[Math.floor(number / COLOURS.length) % DASHES.length] };
  }

  legend() {
    const legend = html("div", "legend", "", this.root);
    this.buttons = this.figure.curves.map((curve, number) => {
      const button = html("button", "", "", legend);
      const line = make("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, button);
      make("line", { x1: 0, x2: 22, y1: 4, y2: 4, "stroke-width": 3, ...this.style(number) }, line);
      html("span", "", `${curve.name} (n = ${curve.n})`, button);
      button.addEventListener("click", () => { this.visible[number] = !this.visible[number]; this.update(); });
      button.addEventListener("pointerenter", () => this.raise(number));
      button.addEventListener("pointerleave", () => this.raise(null));
      return button;
    });
  }

  update() { this.leave(); this.draw(); }

  raise(number) {
    this.front = number !== null && this.visible[number] ? number : null;
    for (const element of this.svg.querySelectorAll("[data-curve]"))
      element.classList.toggle("behind", this.front !== null && Number(element.dataset.curve) !== this.front);
  }

  draw() {
    this.buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(this.visible[i])));
    this.width = this.root.clientWidth;
    const width = Math.max(260, this.width), height = Math.round(Math.min(440, Math.max(240, width * 0.5)));
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.svg.replaceChildren();
    const curves = this.figure.curves.filter((_, i) => this.visible[i]);
    if (!curves.length) {
      make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, this.svg).textContent = "all curves are hidden";
      this.x = this.y = null;
      return;
    }
    const area = { left: 62, right: width - 14, top: 10, bottom: height - 44 };
    const values = curves.flatMap((curve) => curve.y.concat(curve.low || [], curve.high || []));
    this.x = scale(curves.flatMap((curve) => curve.x), area.left, area.right, this.figure.logX, width / 75);
    this.y = scale(values, area.bottom, area.top, this.isLog, height / 55);
    this.axes(area, width, height);
    this.figure.curves.forEach((curve, i) => { if (this.visible[i]) this.line(curve, i); });
    this.dot = make("circle", { r: 5, class: "hidden", fill: "none", "stroke-width": 2 }, this.svg);
  }

  axes(area, width, height) {
    for (const tick of this.y.ticks) {
      const y = this.y.place(tick);
      make("line", { class: "grid", x1: area.left, x2: area.right, y1: y, y2: y }, this.svg);
      make("text", { x: area.left - 6, y: y + 4, "text-anchor": "end" }, this.svg).textContent = shown(tick, this.figure.percent);
    }
    let end = -Infinity;
    for (const tick of this.x.ticks) {
      const x = this.x.place(tick), text = shown(tick, false);
      make("line", { class: "grid", x1: x, x2: x, y1: area.top, y2: area.bottom }, this.svg);
      if (x - text.length * 3.6 < end) continue; // no room beside the one before
      end = x + text.length * 3.6 + 6;
      make("text", { x, y: area.bottom + 18, "text-anchor": "middle" }, this.svg).textContent = text;
    }
    make("text", { x: (area.left + area.right) / 2, y: height - 6, "text-anchor": "middle" }, this.svg).textContent = this.figure.x;
  }

  line(curve, number) {
    const places = (ys) => curve.x.map((x, i) => `${this.x.place(x).toFixed(1)},${this.y.place(ys[i]).toFixed(1)}`);
    const style = this.style(number);
    if (curve.low) {
      const ring = places(curve.low).concat(places(curve.high).reverse());
      make("path", { class: "band", "data-curve": number, d: `M${ring.join("L")}Z`, fill: style.stroke }, this.svg);
    }
    make("path", { class: "curve", "data-curve": number, d: `M${places(curve.y).join("L")}`, ...style }, this.svg);
    if (curve.x.length < 16)
      curve.x.forEach((x, i) => make("circle", { "data-curve": number, cx: this.x.place(x), cy: this.y.place(curve.y[i]), r: 3, fill: style.stroke }, this.svg));
  }

  nearest(left, top) {
    let best = null;
    this.figure.curves.forEach((curve, number) => {
      if (!this.visible[number]) return;
      curve.x.forEach((x, i) => {
        const dx = this.x.place(x) - left, dy = this.y.place(curve.y[i]) - top, distance = dx * dx + dy * dy;
        if (!best || distance < best.distance) best = { distance, number, i };
      });
    });
    return best;
  }

  point(event) {
    if (!this.x) return;
    const box = this.svg.getBoundingClientRect(), left = event.clientX - box.left, top = event.clientY - box.top;
    const { number, i } = this.nearest(left, top), curve = this.figure.curves[number];
    const x = this.x.place(curve.x[i]), y = this.y.place(curve.y[i]);
    for (const [key, value] of [["cx", x], ["cy", y], ["stroke", this.style(number).stroke], ["class", ""]]) this.dot.setAttribute(key, value);
    this.raise(number);
    this.tip.replaceChildren();
    html("b", "", curve.name, this.tip);
    const say = (value) => shown(value, this.figure.percent);
    const range = curve.low ? `, from ${say(curve.low[i])} to ${say(curve.high[i])} (n = ${curve.n})` : "";
    this.tip.append(`${this.figure.x} ${shown(curve.x[i], false)}: ${say(curve.y[i])}${range}`);
    this.tip.classList.remove("hidden");
    const room = this.root.clientWidth - this.tip.offsetWidth, side = x > this.root.clientWidth / 2;
    this.tip.style.left = Math.max(0, Math.min(room, side ? x - this.tip.offsetWidth - 14 : x + 14)) + "px";
    const above = box.top - this.root.getBoundingClientRect().top;
    this.tip.style.top = above + Math.max(0, y - this.tip.offsetHeight - 10) + "px";
  }

  leave() {
    this.tip.classList.add("hidden");
    if (this.dot) this.dot.setAttribute("class", "hidden");
    this.raise(null);
  }
}

// ---- tables ----

function sortBy(table, column, header) {
  const descending = header.getAttribute("aria-sort") === "ascending", body = table.tBodies[0];
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [left, right] = [value(a), value(b)], empty = (left === "") - (right === "");
    if (empty) return empty; // what was not measured stays below
    const order = isNaN(left) || isNaN(right) ? left.localeCompare(right, undefined, { numeric: true }) : left - right;
    return descending ? -order : order;
  };
  body.append(...[...body.rows].sort(compare));
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable"))
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = html("button", "", header.textContent);
    header.replaceChildren(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sortBy(table, column, header));
  });

for (const input of document.querySelectorAll("input[data-filter]"))
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of document.getElementById(input.dataset.filter).tBodies[0].rows)
      row.classList.toggle("hidden", !words.every((word) => row.textContent.toLowerCase().includes(word)));
  });

for (const box of document.querySelectorAll("input[data-column]"))
  box.addEventListener("change", () => {
    for (const row of document.getElementById("settings-table").rows)
      row.cells[Number(box.dataset.column)].classList.toggle("hidden", !box.checked);
  });

const figures = JSON.parse(document.getElementById("figures").textContent);
for (const root of document.querySelectorAll(".chart")) new Chart(root, figures[Number(root.dataset.figure)]);
