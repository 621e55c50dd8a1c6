"use strict";
// The lists of a result as a map, filters and a table. All that comes from the data is set as text.
(() => {
  const ROW = 28; // height of a row, as in page.css
  const FACET_MOST = 400; // a column with more values than this is for searching only
  const FACET_SHOWN = 12;
  const parts = JSON.parse(document.getElementById("data").textContent);

  const make = (name, attributes = {}, ...inside) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "on") for (const [event, call] of Object.entries(value)) element.addEventListener(event, call);
      else element.setAttribute(key, value);
    }
    element.append(...inside);
    return element;
  };
  const svg = (name, attributes = {}) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const grouped = (number) => number.toLocaleString("en-US");

  // Rectangles for weights, as square as may be: Bruls, Huizing, van Wijk, "Squarified Treemaps".
  function squarified(items, x, y, width, height) {
    const out = [];
    let left = items.filter((item) => item.weight > 0).sort((a, b) => b.weight - a.weight);
    let total = left.reduce((sum, item) => sum + item.weight, 0);
    while (left.length) {
      const short = Math.min(width, height), area = width * height;
      const worst = (row, sum) => {
        const side = (sum / total) * area / short;
        return Math.max(...row.map((item) => {
          const other = ((item.weight / total) * area) / side;
          return Math.max(side / other, other / side);
        }));
      };
      let row = [left[0]], sum = left[0].weight, best = worst(row, sum);
      for (let next = 1; next < left.length; next++) {
        const wider = [...row, left[next]], more = sum + left[next].weight, now = worst(wider, more);
        if (now > best) break;
        [row, sum, best] = [wider, more, now];
      }
      const thick = (sum / total) * area / short;
      let at = 0;
      for (const item of row) {
        const long = (item.weight / sum) * short;
        out.push(width >= height
          ? { item, x, y: y + at, width: thick, height: long }
          : { item, x: x + at, y, width: long, height: thick });
        at += long;
      }
      if (width >= height) [x, width] = [x + thick, width - thick];
      else [y, height] = [y + thick, height - thick];
      left = left.slice(row.length);
      total -= sum;
    }
    return out;
  }

  // Cells are numbers: places in `texts`, where each text stands once.
  class List {
    constructor(part, data, number, state) {
      this.part = part;
      this.name = data.name;
      this.columns = data.columns;
      this.count = data.rows.length;
      this.number = number;
      this.wrong = new Map(data.found);
      this.state = state;
      this.texts = [...part.texts];
      const places = new Map();
      const code = (cell) => {
        if (typeof cell === "number") return cell;
        const text = cell[0] === null ? "" : String(cell[0]);
        if (!places.has(text)) {
          places.set(text, this.texts.length);
          this.texts.push(text);
        }
        return places.get(text);
      };
      this.cells = this.columns.map((_, at) => Int32Array.from(data.rows, (row) => code(row[at])));
      this.facets = this.columns.map((_, at) => at).filter((at) => this.isFacet(at));
      this.lower = null;
    }
    text(row, at) { return this.texts[this.cells[at][row]]; }
    isFacet(at) {
      const seen = new Set();
      for (const code of this.cells[at]) {
        seen.add(code);
        if (seen.size > FACET_MOST) return false;
      }
      return seen.size > 1 && (seen.size < this.count / 2 || seen.size <= 3);
    }
    column(name) { return this.columns.indexOf(name); }
    // For each word, whether each row has it in some cell.
    having(word) {
      this.lower ||= this.texts.map((text) => text.toLowerCase());
      const hit = Uint8Array.from(this.lower, (text) => text.includes(word));
      const rows = new Uint8Array(this.count);
      for (const cells of this.cells) for (let row = 0; row < this.count; row++) rows[row] |= hit[cells[row]];
      return rows;
    }
    filtered(but = -1) {
      const words = this.state.search.toLowerCase().split(/\s+/).filter(Boolean).map((word) => this.having(word));
      const chosen = [...this.state.facets].filter(([at, values]) => at !== but && values.size).map(([at, values]) => {
        const codes = new Uint8Array(this.texts.length);
        this.texts.forEach((text, place) => { if (values.has(text)) codes[place] = 1; });
        return [this.cells[at], codes];
      });
      const found = [];
      for (let row = 0; row < this.count; row++) {
        if (this.state.wrong && !this.wrong.has(row)) continue;
        if (chosen.every(([cells, codes]) => codes[cells[row]]) && words.every((rows) => rows[row])) found.push(row);
      }
      return found;
    }
    // Values of a column, most frequent first.
    hues(at) {
      if (at === undefined) return [""];
      this.order ||= [...this.counts(at, this.cells[at].keys())].sort((a, b) => b[1] - a[1]).map(([hue]) => hue);
      return this.order;
    }
    // How many of some rows have each value of a column: [[value, count], …].
    counts(at, rows) {
      const counts = new Int32Array(this.texts.length), cells = this.cells[at], seen = [];
      for (const row of rows) if (!counts[cells[row]]++) seen.push(cells[row]);
      const merged = new Map();
      for (const place of seen) merged.set(this.texts[place], (merged.get(this.texts[place]) || 0) + counts[place]);
      return merged;
    }
  }

  class Explorer {
    constructor(place, part, index) {
      this.place = place;
      this.part = part;
      this.index = index;
      this.states = part.lists.map(() => ({ search: "", facets: new Map(), wrong: false, chosen: -1 }));
      this.lists = part.lists.map((data, at) => new List(part, data, at, this.states[at]));
      this.show(0, false);
    }
    show(at, remember = true) {
      this.list = this.lists[at];
      this.build();
      this.refresh(remember);
    }
    build() {
      const { list } = this;
      this.search = make("input", { type: "search", placeholder: "Filter: words, all of them (press /)", "aria-label": "Filter", on: {
        input: () => { list.state.search = this.search.value; this.refresh(); } } });
      this.search.value = list.state.search;
      this.count = make("span", { class: "count", role: "status" });
      const bar = make("div", { class: "bar" });
      if (this.lists.length > 1) {
        for (const each of this.lists) {
          bar.append(make("button", { "aria-selected": each === list, role: "tab", on: { click: () => this.show(each.number) } },
            `${each.name} ${grouped(each.count)}`));
        }
      }
      bar.append(this.search);
      if (list.wrong.size) {
        this.only = make("button", { "aria-pressed": list.state.wrong, on: { click: () => {
          list.state.wrong = !list.state.wrong; this.refresh(); } } }, `findings ${grouped(list.wrong.size)}`);
        bar.append(this.only);
      } else this.only = null;
      bar.append(make("button", { on: { click: () => this.clear() } }, "clear"), this.count);
      this.map = make("div", { class: "map" });
      this.legend = make("div", { class: "legend-bar" });
      this.side = make("div", { class: "facets" });
      this.sized = make("div", { class: "sized" });
      this.rows = make("div", { class: "rows", tabindex: 0, "aria-label": list.name, on: {
        scroll: () => this.draw(), keydown: (event) => this.key(event) } }, this.sized);
      this.evidence = make("div", { class: "evidence" });
      const hasMap = this.mapped();
      this.place.replaceChildren(bar, ...(hasMap ? [this.map, this.legend] : []),
        make("div", { class: "body" }, this.side, this.rows, this.evidence));
    }
    mapped() {
      this.area = ["subsystem", "image", "trap", "scenario"].map((name) => this.list.column(name)).find((at) => this.list.facets.includes(at));
      this.colour = ["class", "verdict", "kind"].map((name) => this.list.column(name)).find((at) => this.list.facets.includes(at));
      return this.area !== undefined && this.list.count > 20;
    }
    clear() {
      Object.assign(this.list.state, { search: "", wrong: false, chosen: -1 });
      this.list.state.facets.clear();
      this.search.value = "";
      this.refresh();
    }
    toggle(at, value, only = false) {
      const { facets } = this.list.state;
      const values = facets.get(at) || new Set();
      if (only && !(values.size === 1 && values.has(value))) values.clear();
      if (!values.delete(value)) values.add(value);
      facets.set(at, values);
      this.refresh();
    }
    refresh(remember = true) {
      const { list } = this;
      this.found = list.filtered();
      this.count.textContent = `${grouped(this.found.length)} of ${grouped(list.count)}`;
      if (this.only) this.only.setAttribute("aria-pressed", list.state.wrong);
      this.drawFacets();
      this.drawMap();
      this.sized.style.height = `${(this.found.length + 1) * ROW}px`;
      this.rows.scrollTop = 0;
      this.draw();
      this.drawEvidence();
      if (remember) remembered(this);
    }
    drawFacets() {
      const { list } = this;
      const out = [];
      for (const at of list.facets) {
        const chosen = list.state.facets.get(at) || new Set();
        const counts = list.counts(at, chosen.size ? list.filtered(at) : this.found);
        for (const value of chosen) if (!counts.has(value)) counts.set(value, 0);
        const sorted = [...counts].sort((a, b) => chosen.has(b[0]) - chosen.has(a[0]) || b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
        out.push(make("h4", {}, list.columns[at]));
        for (const [value, count] of sorted.slice(0, FACET_SHOWN)) {
          out.push(make("button", { "aria-pressed": chosen.has(value), title: value, on: { click: () => this.toggle(at, value) } },
            make("span", {}, value || "–"), make("span", { class: "count" }, grouped(count))));
        }
        if (sorted.length > FACET_SHOWN) {
          const more = make("select", { "aria-label": `more of ${list.columns[at]}`, on: { change: () => this.toggle(at, more.value) } },
            make("option", { value: "" }, `${grouped(sorted.length - FACET_SHOWN)} more…`),
            ...sorted.slice(FACET_SHOWN).map(([value, count]) => make("option", { value }, `${value || "–"} (${count})`)));
          out.push(more);
        }
      }
      this.side.replaceChildren(...out);
    }
    drawMap() {
      if (!this.mapped()) return;
      const { list } = this;
      const groups = new Map();
      for (const row of this.found) {
        const area = list.text(row, this.area);
        const hue = this.colour === undefined ? "" : list.text(row, this.colour);
        if (!groups.has(area)) groups.set(area, new Map());
        const inside = groups.get(area);
        inside.set(hue, (inside.get(hue) || 0) + 1);
      }
      const hues = this.colour === undefined ? new Map([["", this.found.length]]) : list.counts(this.colour, this.found);
      const order = list.hues(this.colour); // of all rows, so that a colour means the same under each filter
      const width = this.map.clientWidth || 1000, height = this.map.clientHeight || 240;
      const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "sites by area" });
      const outer = squarified([...groups].map(([name, inside]) => (
        { name, inside, weight: [...inside.values()].reduce((a, b) => a + b, 0) })), 0, 0, width, height);
      for (const box of outer) {
        const { name, inside, weight } = box.item;
        const cells = squarified([...inside].map(([hue, count]) => ({ hue, weight: count })), box.x, box.y, box.width, box.height);
        for (const cell of cells) {
          const rect = svg("rect", { x: cell.x, y: cell.y, width: cell.width, height: cell.height, "stroke-width": 0.5,
            class: `c${order.indexOf(cell.item.hue) % 10}` });
          const said = svg("title");
          said.textContent = `${name || "–"}: ${cell.item.hue} ${grouped(cell.item.weight)} of ${grouped(weight)}`;
          rect.append(said);
          rect.addEventListener("click", () => this.toggle(this.area, name, true));
          picture.append(rect);
        }
        picture.append(svg("rect", { x: box.x, y: box.y, width: box.width, height: box.height, fill: "none", "stroke-width": 2, "pointer-events": "none" }));
        if (box.width > 60 && box.height > 16) {
          const label = svg("text", { x: box.x + 5, y: box.y + 14 });
          const fits = Math.floor((box.width - 8) / 6.3);
          const whole = `${name || "–"} ${grouped(weight)}`;
          label.textContent = whole.length > fits ? `${whole.slice(0, fits - 1)}…` : whole;
          picture.append(label);
        }
      }
      this.map.replaceChildren(picture);
      this.legend.replaceChildren(...order.filter((hue) => hues.has(hue)).slice(0, 10).map((hue) => make("span", {},
        make("span", { class: `swatch c${order.indexOf(hue) % 10}` }), `${hue || list.name} ${grouped(hues.get(hue))}`)));
    }
    shown() {
      // What tells rows apart at a glance, widest last.
      const wanted = ["class", "trap", "verdict", "kind", "name", "function", "label", "count", "instruction", "boot", "cause", "driver", "subsystem", "file", "scenario", "event", "detail"];
      const found = wanted.map((name) => this.list.column(name)).filter((at) => at >= 0).slice(0, 6);
      return found.length ? found : this.list.columns.map((_, at) => at).slice(0, 5);
    }
    draw() {
      const { list } = this;
      const shown = this.shown();
      const wide = (at) => (["function", "instruction", "label", "cause", "detail", "file"].includes(list.columns[at]) ? "w3" : ["name", "subsystem", "driver"].includes(list.columns[at]) ? "w2" : "w1");
      const top = this.rows.scrollTop, first = Math.max(0, Math.floor(top / ROW) - 10);
      const last = Math.min(this.found.length, first + Math.ceil((this.rows.clientHeight || 512) / ROW) + 20);
      const head = make("div", { class: "row head" }, make("span", { class: "bad" }), ...shown.map((at) => make("span", { class: wide(at) }, list.columns[at])));
      const out = [head];
      for (let at = first; at < last; at++) {
        const row = this.found[at];
        const wrong = list.wrong.has(row);
        const line = make("div", { class: row === list.state.chosen ? "row chosen" : "row", on: { click: () => this.choose(row) } },
          make("span", { class: "bad", title: wrong ? "a finding" : "" }, wrong ? "●" : ""),
          ...shown.map((c) => make("span", { class: wide(c), title: list.text(row, c) }, list.text(row, c))));
        line.style.top = `${(at + 1) * ROW}px`;
        out.push(line);
      }
      this.sized.replaceChildren(...out);
    }
    choose(row) {
      this.list.state.chosen = row;
      this.draw();
      this.drawEvidence();
      remembered(this);
    }
    drawEvidence() {
      const { list } = this;
      const row = list.state.chosen;
      if (row < 0 || row >= list.count) return this.evidence.replaceChildren();
      const id = list.column("id");
      const out = [make("h4", { class: "mono" }, id >= 0 ? list.text(row, id) : `${list.name} ${row + 1}`)];
      if (list.wrong.has(row)) out.push(make("p", { class: "wrong" }, this.part.texts[list.wrong.get(row)]));
      const terms = make("dl");
      list.columns.forEach((name, at) => {
        const value = list.text(row, at);
        if (value === "" || name === "id") return;
        const chain = name === "inlined" || name === "trace" ? value.split("; ") : null;
        terms.append(make("dt", {}, name),
          make("dd", { class: "mono" }, chain ? make("ol", {}, ...chain.map((each) => make("li", {}, each))) : value));
      });
      this.evidence.replaceChildren(...out, terms);
    }
    key(event) {
      const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 15, PageUp: -15 }[event.key];
      if (event.key === "Escape") return this.choose(-1);
      if (!step || !this.found.length) return;
      event.preventDefault();
      const at = this.found.indexOf(this.list.state.chosen);
      const next = Math.min(this.found.length - 1, Math.max(0, at < 0 ? 0 : at + step));
      const top = (next + 1) * ROW;
      if (top < this.rows.scrollTop + ROW) this.rows.scrollTop = top - ROW;
      if (top > this.rows.scrollTop + this.rows.clientHeight - ROW) this.rows.scrollTop = top - this.rows.clientHeight + ROW;
      this.choose(this.found[next]);
    }
  }

  // The address of the page says what is shown, so that a link is an answer.
  let ready = false;
  function remembered(explorer) {
    if (!ready) return;
    const { list } = explorer;
    const said = new URLSearchParams();
    if (explorer.index) said.set("part", explorer.index);
    if (list.number) said.set("list", list.name);
    if (list.state.search) said.set("q", list.state.search);
    if (list.state.wrong) said.set("findings", "1");
    for (const [at, values] of list.state.facets) for (const value of values) said.append(`f.${list.columns[at]}`, value);
    if (list.state.chosen >= 0) said.set("row", list.state.chosen);
    history.replaceState(null, "", `#${said}`);
  }
  function recall() {
    const said = new URLSearchParams(location.hash.slice(1));
    const index = Math.min(parts.length - 1, Math.max(0, Number(said.get("part")) || 0));
    open(index);
    const explorer = explorers[index];
    if (!explorer) return;
    const list = explorer.lists.find((each) => each.name === said.get("list")) || explorer.lists[0];
    list.state.search = said.get("q") || "";
    list.state.wrong = said.get("findings") === "1";
    list.state.facets.clear();
    for (const [key, value] of said) {
      const at = key.startsWith("f.") ? list.column(key.slice(2)) : -1;
      if (at < 0) continue;
      list.state.facets.set(at, (list.state.facets.get(at) || new Set()).add(value));
    }
    list.state.chosen = said.has("row") ? Number(said.get("row")) : -1;
    explorer.show(list.number, false);
  }

  const nav = document.querySelector("nav");
  const sections = [...document.querySelectorAll(".part")];
  const explorers = parts.map((part, index) => (part.lists.length
    ? new Explorer(document.getElementById(`explorer${index}`), part, index) : null));
  let current = 0;
  function open(index) {
    current = index;
    sections.forEach((section, at) => { section.hidden = at !== index; });
    [...nav.querySelectorAll("[role=tab]")].forEach((tab, at) => tab.setAttribute("aria-selected", at === index));
    if (explorers[index]) explorers[index].refresh(false);
  }
  if (parts.length > 1) {
    parts.forEach((part, index) => nav.append(make("button", { role: "tab", on: { click: () => {
      open(index);
      history.replaceState(null, "", index ? `#part=${index}` : "#");
    } } }, part.title)));
  }
  nav.append(make("button", { title: "light or dark", on: { click: () => {
    const root = document.documentElement;
    const dark = root.classList.contains("dark") || (!root.classList.contains("light") && matchMedia("(prefers-color-scheme: dark)").matches);
    root.classList.toggle("dark", !dark);
    root.classList.toggle("light", dark);
  } } }, "◐"));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.closest("input, select")) return;
    event.preventDefault();
    if (explorers[current]) explorers[current].search.focus();
  });
  addEventListener("hashchange", recall);
  addEventListener("resize", () => { if (explorers[current]) explorers[current].drawMap(); });
  recall();
  ready = true;
  document.body.dataset.ready = "1";
})();
