// The text: rows of cells, of which only those in sight exist.

const GUTTER = 7, LEVELS = 15, SIDES = 7;

// Levels of shading by token: 1 to LEVELS, or -SIDES to SIDES for a measure with two directions; 0: none.
function levelsOf(values, diverging) {
  const finite = [];
  const step = Math.max(1, Math.floor(T / 20000));
  for (let t = 0; t < T; t += step) if (Number.isFinite(values[t])) finite.push(diverging ? Math.abs(values[t]) : values[t]);
  finite.sort((a, b) => a - b);
  const at = (share) => (finite.length ? finite[Math.min(finite.length - 1, Math.floor(share * finite.length))] : 0);
  const high = at(0.99) || at(1), low = diverging ? 0 : Math.min(at(0.01), high);
  const levels = new Int8Array(T), most = diverging ? SIDES : LEVELS;
  for (let t = 0; t < T; t++) {
    const value = values[t];
    if (!Number.isFinite(value) || high === low) continue;
    const level = Math.min(most, Math.max(0, Math.round(((Math.abs(value) * (diverging ? 1 : Math.sign(value) || 1)) - low) / (high - low) * most)));
    levels[t] = diverging && value < 0 ? -level : level;
  }
  return {levels, low: diverging ? -high : low, high, diverging};
}
const classOf = (level, diverging) => (!level ? "" : diverging ? (level < 0 ? `n${-level}` : `p${level}`) : `l${level}`);

class TextPane {
  constructor(id, label, events) {
    this.events = events;
    this.id = id;
    this.shade = {levels: new Int8Array(T), diverging: false};
    this.active = 0;
    this.region = null;
    this.marks = new Map();
    this.drawn = new Map();
    this.spacer = element("div", {role: "presentation", class: "spacer"});
    this.grid = element("div", {
      class: "pane", id, tabindex: "0", role: "grid", "aria-label": label, "aria-describedby": "keys",
      onscroll: () => this.draw(), onkeydown: (event) => this.key(event),
    }, this.spacer);
    const tokenAt = (event) => {
      const cell = event.target.closest("[data-t]");
      return cell ? Number(cell.dataset.t) : null;
    };
    this.grid.addEventListener("pointermove", (event) => {
      const token = tokenAt(event);
      if (token !== null) events.hover(token);
    });
    this.grid.addEventListener("pointerleave", () => events.hover(null));
    this.grid.addEventListener("click", (event) => {
      const token = tokenAt(event);
      if (token !== null) events.activate(token, {scroll: false});
    });
    this.rows = [0];
    this.columns = 0;
  }

  // Break the text into rows of the pane's width.
  layout() {
    const probe = element("span", {class: "probe", text: "0".repeat(100)});
    this.grid.append(probe);
    const letter = probe.getBoundingClientRect().width / 100;
    this.height = Math.max(12, Math.round(probe.getBoundingClientRect().height * 1.25));
    probe.remove();
    const columns = Math.max(12, Math.floor((this.grid.clientWidth - 12) / letter) - GUTTER);
    if (columns === this.columns) return false;
    this.columns = columns;
    const rows = [0];
    let used = 0, space = -1, since = 0;
    for (let t = 0; t < T; t++) {
      const width = widths[t];
      if (used + width > columns && t > rows[rows.length - 1] && units[t]) {
        const cut = space > rows[rows.length - 1] && since < columns / 2 ? space : t;
        used = cut === t ? 0 : since;
        rows.push(cut);
        space = -1;
      }
      used += width;
      since += width;
      if (units[t] === 1 && text[offsets[t]] === " ") { space = nextCell(t); since = 0; }
      if (flags[t] & LINE_END && t + 1 < T) { const next = nextCell(t); if (next < T) { rows.push(next); used = 0; since = 0; space = -1; t = next - 1; } }
    }
    this.rows = rows;
    this.spacer.style.height = `${rows.length * this.height}px`;
    this.grid.setAttribute("aria-rowcount", rows.length);
    this.redraw();
    return true;
  }

  rowOf(token) {
    let low = 0, high = this.rows.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.rows[middle] <= token) low = middle; else high = middle - 1;
    }
    return low;
  }

  inSight() {
    const first = Math.max(0, Math.floor(this.grid.scrollTop / this.height));
    return [first, Math.min(this.rows.length, Math.ceil((this.grid.scrollTop + this.grid.clientHeight) / this.height))];
  }

  // The tokens in sight, from the first to before the second.
  tokensInSight() {
    const [first, end] = this.inSight();
    return [this.rows[Math.min(first, this.rows.length - 1)], end < this.rows.length ? this.rows[end] : T];
  }

  redraw() {
    for (const row of this.drawn.values()) row.remove();
    this.drawn.clear();
    this.draw();
  }

  draw() {
    let [first, end] = this.inSight();
    first = Math.max(0, first - 6);
    end = Math.min(this.rows.length, end + 6);
    const keep = this.rowOf(this.active);
    for (const [number, row] of this.drawn) {
      if ((number < first || number >= end) && number !== keep) { row.remove(); this.drawn.delete(number); }
    }
    for (let number = first; number < end; number++) if (!this.drawn.has(number)) this.addRow(number);
    if (!this.drawn.has(keep)) this.addRow(keep);  // the active cell has to exist for screen readers
    this.grid.setAttribute("aria-activedescendant", `${this.id}-${cellOf(this.active)[0]}`);
    this.events.scrolled(this);
  }

  addRow(number) {
    const row = element("div", {role: "row", class: "row", "aria-rowindex": number + 1});
    row.style.transform = `translateY(${number * this.height}px)`;
    row.style.height = row.style.lineHeight = `${this.height}px`;
    const first = this.rows[number], end = number + 1 < this.rows.length ? this.rows[number + 1] : T;
    const line = lineAt[first];
    row.append(element("span", {role: "rowheader", class: "gutter", text: line ? String(line) : "", "aria-label": line ? `line ${line}` : "line goes on"}));
    for (let t = first; t < end;) {
      const next = nextCell(t);
      row.append(this.cell(t, next));
      t = next;
    }
    const next = [...this.drawn.keys()].filter((other) => other > number).sort((a, b) => a - b)[0];
    this.spacer.insertBefore(row, next === undefined ? null : this.drawn.get(next));  // in the text's order, for readers
    this.drawn.set(number, row);
  }

  cell(first, end) {
    let level = 0;
    for (let t = first; t < end; t++) if (Math.abs(this.shade.levels[t]) > Math.abs(level)) level = this.shade.levels[t];
    const kinds = [classOf(level, this.shade.diverging)];
    if (flags[first] & SYMBOL) kinds.push("symbol");
    if (this.active >= first && this.active < end) kinds.push("active");
    if (this.region && first >= this.region[0] && first < this.region[1]) kinds.push("region");
    if (this.marks.has(first)) kinds.push("source");
    return element("span", {
      role: "gridcell", id: `${this.id}-${first}`, "data-t": first, class: kinds.filter(Boolean).join(" ") || null,
      text: cellText(first),
    });
  }

  setShade(shade) { this.shade = shade; this.redraw(); }
  setRegion(region) { this.region = region; this.redraw(); }
  setMarks(marks) { this.marks = marks; this.redraw(); }

  setActive(token) {
    const before = this.rowOf(this.active), after = this.rowOf(token);
    this.active = token;
    for (const number of new Set([before, after])) {
      const row = this.drawn.get(number);
      if (row) { row.remove(); this.drawn.delete(number); }
    }
    this.draw();
  }

  // Scroll so that a token is in sight, in the upper third if it was not.
  reveal(token, always = false) {
    const top = this.rowOf(token) * this.height, view = this.grid;
    if (always || top < view.scrollTop || top + this.height > view.scrollTop + view.clientHeight) {
      view.scrollTop = Math.max(0, top - view.clientHeight / 3);
    }
    this.draw();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const screen = Math.max(1, Math.floor(this.grid.clientHeight / this.height) - 1), row = this.rowOf(this.active);
    const down = (rows) => {
      const goal = Math.min(this.rows.length - 1, Math.max(0, row + rows));
      const end = goal + 1 < this.rows.length ? this.rows[goal + 1] - 1 : T - 1;
      return Math.min(end, this.rows[goal] + this.active - this.rows[row]);
    };
    const moves = {
      ArrowRight: () => this.active + 1, ArrowLeft: () => this.active - 1, ArrowDown: () => down(1), ArrowUp: () => down(-1),
      PageDown: () => down(screen), PageUp: () => down(-screen), Home: () => (event.shiftKey ? 0 : this.rows[row]),
      End: () => (event.shiftKey ? T - 1 : down(0) - this.active + (row + 1 < this.rows.length ? this.rows[row + 1] - 1 : T - 1)),
      n: () => this.events.peak(this.active),
    };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    this.events.activate(Math.min(T - 1, Math.max(0, move())), {scroll: true, say: true});
  }
}

function nextCell(t) {
  let next = t + 1;
  while (next < T && units[next] === 0) next++;
  return next;
}
