// Charts along the text, drawn by uPlot. They share the tokens that they show, the cursor and the marked region.

const CHART_HEIGHT = 118;

// Means, or highest values, of up to `bins` bins of the tokens from `first` to before `end`.
function binned(values, first, end, bins, highest) {
  const number = Math.max(1, Math.min(bins, end - first)), out = new Array(number);
  for (let i = 0; i < number; i++) {
    const a = first + Math.floor(i * (end - first) / number), b = first + Math.floor((i + 1) * (end - first) / number);
    let sum = 0, seen = 0, most = -Infinity;
    for (let t = a; t < b; t++) {
      if (!Number.isFinite(values[t])) continue;
      sum += values[t]; seen++;
      if (values[t] > most) most = values[t];
    }
    out[i] = seen ? (highest ? most : sum / seen) : null;
  }
  return out;
}
function centres(first, end, bins) {
  const number = Math.max(1, Math.min(bins, end - first));
  return Array.from({length: number}, (_, i) => first + ((i + 0.5) * (end - first)) / number);
}

class Charts {
  constructor(root, events) {
    this.root = root;
    this.events = events;
    this.range = [0, T];
    this.region = null;
    this.sight = [0, 0];
    this.active = 0;
    this.arcs = [];
    this.plots = [];
  }

  colours() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    return {series: [1, 2, 3, 4, 5, 6].map((i) => of(`--s${i}`)), text: of("--text"), grid: of("--grid"), mark: of("--mark"), sight: of("--sight"), region: of("--region")};
  }

  // What each chart shows, for a layer and head.
  plan(layer, head) {
    const by = (name) => valuesOf(name, layer, head), which = whichHead(layer, head);
    const bits = [{label: "with memory", values: column("bits")}];
    if (column("bits_frozen")) bits.push({label: "memory frozen", values: column("bits_frozen")});
    meta.others.forEach((one, i) => bits.push({label: one.label, values: from(column(`other${i}`), one.start)}));
    if (column("compared")) bits.push({label: meta.compared, values: column("compared")});
    const plan = [{key: "bits", title: "Bits of a token, mean", lines: bits}];
    if (by("surprise")) plan.push({key: "surprise", title: `Surprise, highest, ${which}`, highest: true, lines: [{label: "reconstruction loss", values: by("surprise")}]});
    const gates = ["theta", "eta", "alpha", "output_gate", "memory_gate"].filter(by);
    if (gates.length) plan.push({key: "gates", title: `Gates, mean, ${which}`, lines: gates.map((name) => ({label: name.replace("_", " "), values: by(name)}))});
    plan.push({key: "norms", title: `Norms, ${whichNorm(layer, head)}`, points: true, lines: [
      {label: "change of memory", values: normsOf("memory_change", layer, head)},
      {label: "momentum", values: normsOf("momentum_norm", layer, head)},
    ]});
    return plan;
  }

  build(layer, head) {
    for (const {plot} of this.plots) plot.destroy();
    this.root.replaceChildren();
    const colours = this.colours(), width = Math.max(240, this.root.clientWidth);
    this.plots = this.plan(layer, head).map((chart) => this.add(chart, colours, width));
  }

  add(chart, colours, width) {
    const dashes = [[], [6, 4], [2, 3], [8, 3, 2, 3], [1, 4], [10, 5]];
    const legend = element("ul", {class: "legend"}, ...chart.lines.map((line, i) => element("li", {},
      element("span", {class: `key k${i + 1}`, "aria-hidden": "true"}), line.label)));
    const box = element("div", {
      class: "chart", tabindex: "0", role: "slider", "aria-label": `${chart.title}; position in the text`, "aria-describedby": "chart-keys",
      "aria-valuemin": 0, "aria-valuemax": T - 1, onkeydown: (event) => this.key(event, chart),
    });
    this.root.append(element("figure", {}, element("figcaption", {}, element("span", {text: chart.title}), legend), box));
    const axis = {stroke: colours.text, grid: {stroke: colours.grid, width: 1}, ticks: {stroke: colours.grid, width: 1}, font: "11px system-ui, sans-serif"};
    const options = {
      width, height: CHART_HEIGHT, legend: {show: false}, padding: [8, 26, 0, 0],
      cursor: {sync: {key: "text"}, drag: {x: true, y: false, setScale: false}, points: {size: 5}},
      scales: {x: {time: false, range: () => this.range}, y: {range: (_, low, high) => spread(low, high)}},
      axes: [{...axis, size: 26, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? count(tick) : ""))}, {...axis, size: 52, values: (_, ticks) => ticks.map(tickText)}],
      series: [{}, ...chart.lines.map((line, i) => ({label: line.label, stroke: colours.series[i % 6], dash: dashes[i % 6], width: 1.25, spanGaps: false, points: {show: false}}))],
      hooks: {
        setSelect: [(plot) => this.selected(plot)],
        drawClear: [(plot) => this.under(plot, colours)],
        draw: [(plot) => this.over(plot, colours, chart)],
        setCursor: [(plot) => { if (plot.cursor.event && plot.cursor.left >= 0) this.events.hover(this.tokenAt(plot, plot.cursor.left)); }],
      },
    };
    const plot = new uPlot(options, this.dataOf(chart, width), box);
    plot.root.setAttribute("aria-hidden", "true");
    let pressed = 0;
    plot.over.addEventListener("mousedown", (event) => { pressed = event.clientX; });
    plot.over.addEventListener("click", (event) => {
      if (Math.abs(event.clientX - pressed) < 3) this.clicked(plot, chart, event.offsetX);
    });
    plot.over.addEventListener("mouseleave", () => this.events.hover(null));
    plot.over.addEventListener("dblclick", () => this.events.zoom(null));
    return {plot, chart, box};
  }

  dataOf(chart, width) {
    const [first, end] = this.range;
    if (chart.points) return [Array.from(column("checkpoint")), ...chart.lines.map((line) => Array.from(line.values, (v) => (Number.isFinite(v) ? v : null)))];
    const bins = Math.max(60, Math.floor((width - 60) * 1.0));
    return [centres(first, end, bins), ...chart.lines.map((line) => binned(line.values, first, end, bins, chart.highest))];
  }

  setRange(range) {
    this.range = range;
    for (const {plot, chart} of this.plots) plot.setData(this.dataOf(chart, plot.width));
    this.setRegion(this.region);
  }

  resize() {
    const width = Math.max(240, this.root.clientWidth);
    for (const {plot, chart} of this.plots) {
      if (plot.width === width) continue;
      plot.setSize({width, height: CHART_HEIGHT});
      plot.setData(this.dataOf(chart, width));
    }
  }

  setRegion(region) { this.region = region; this.refresh(); }
  setSight(sight) { this.sight = sight; this.refresh(); }
  setActive(token) {
    this.active = token;
    for (const {box, chart} of this.plots) {
      box.setAttribute("aria-valuenow", token);
      const value = chart.points ? "" : `, ${chart.lines[0].label} ${shown(chart.lines[0].values[token])}`;
      box.setAttribute("aria-valuetext", `token ${count(token)}${value}`);
    }
    this.refresh();
  }
  setArcs(arcs) { this.arcs = arcs; this.refresh(); }

  refresh() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = null;
      for (const {plot} of this.plots) plot.redraw(false, false);
    });
  }

  tokenAt(plot, left) {
    return Math.min(T - 1, Math.max(0, Math.floor(plot.posToVal(left, "x"))));
  }

  selected(plot) {
    const {left, width} = plot.select;
    if (width < 3) return;
    const region = [this.tokenAt(plot, left), this.tokenAt(plot, left + width) + 1];
    plot.setSelect({left: 0, width: 0, top: 0, height: 0}, false);
    this.events.mark(region);
  }

  // The highest token near a click.
  clicked(plot, chart, left) {
    const first = this.tokenAt(plot, left - 4), end = this.tokenAt(plot, left + 4) + 1;
    const values = chart.points ? column("bits") : chart.lines[0].values;
    let best = first;
    for (let t = first; t < end; t++) if (!(values[t] <= values[best]) && Number.isFinite(values[t])) best = t;
    this.events.activate(best, {scroll: true});
  }

  under(plot, colours) {
    const band = ([first, end], colour) => {
      const [a, b] = [first, end].map((token) => plot.valToPos(Math.min(this.range[1], Math.max(this.range[0], token)), "x", true));
      if (b <= a || end <= this.range[0] || first >= this.range[1]) return;
      plot.ctx.fillStyle = colour;
      plot.ctx.fillRect(a, plot.bbox.top, Math.max(2, b - a), plot.bbox.height);
    };
    plot.ctx.save();
    band(this.sight, colours.sight);
    if (this.region) band(this.region, colours.region);
    plot.ctx.restore();
  }

  over(plot, colours, chart) {
    const {ctx, bbox} = plot, at = (token) => plot.valToPos(token + 0.5, "x", true);
    if (this.active < this.range[0] || this.active >= this.range[1]) return;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.strokeStyle = colours.mark;
    ctx.setLineDash([]);
    ctx.lineWidth = devicePixelRatio;
    ctx.beginPath();
    ctx.moveTo(at(this.active), bbox.top);
    ctx.lineTo(at(this.active), bbox.top + bbox.height);
    ctx.stroke();
    if (chart.key === "bits") {
      for (const {from: first, to, share} of this.arcs) {
        const [a, b] = [at(first), at(to)], base = bbox.top + bbox.height;
        ctx.lineWidth = devicePixelRatio * (1 + 3 * share);
        ctx.beginPath();
        ctx.moveTo(a, base);
        ctx.quadraticCurveTo((a + b) / 2, base - 1.7 * bbox.height * Math.min(1, 0.3 + (b - a) / bbox.width), b, base);
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  key(event, chart) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = Math.max(1, Math.round((this.range[1] - this.range[0]) / 200));
    const steps = {ArrowRight: step, ArrowUp: step, ArrowLeft: -step, ArrowDown: -step, PageUp: 10 * step, PageDown: -10 * step, Home: -T, End: T};
    if (event.key in steps) {
      const token = Math.min(T - 1, Math.max(0, this.active + steps[event.key]));
      if (event.shiftKey) {
        this.anchor = this.region && this.anchor !== undefined ? this.anchor : this.active;
        this.events.mark([Math.min(this.anchor, token), Math.max(this.anchor, token) + 1], false);
      } else {
        this.anchor = undefined;
      }
      this.events.activate(token, {scroll: true, say: true, chart});
    } else if (event.key === "Enter") this.events.zoom(this.region);
    else if (event.key === "Escape") this.events.zoom(null);
    else return;
    event.preventDefault();
  }
}

const from = (values, start) => Float32Array.from(values, (value, t) => (t < start ? NaN : value));
const spread = (low, high) => {
  if (low === null || high === null) return [0, 1];
  const bottom = Math.min(0, low);
  return high > bottom ? [bottom, high + (high - bottom) * 0.06] : [bottom, bottom + 1];
};
const tickText = (tick) => (tick === 0 ? "0" : Math.abs(tick) < 0.001 || Math.abs(tick) >= 1e5 ? tick.toExponential(0) : String(Number(tick.toPrecision(4))));
const named = (word, index, number) => (index === ALL || number === 1 ? (number === 1 ? `${word} 0` : `mean of ${word}s`) : `${word} ${index}`);
const whichHead = (layer, head) => `${named("layer", layer, meta.layers)}, ${named("head", head, meta.heads)}`;
const whichNorm = (layer, head) => `${named("layer", layer, meta.norm_layers)}, ${named("head", head, meta.norm_heads)}`;

function normsOf(name, layer, head) {
  const values = column(name), checkpoints = column("checkpoint").length, mean = new Float32Array(checkpoints);
  let parts = 0;
  for (let l = 0; l < meta.norm_layers; l++) {
    for (let h = 0; h < meta.norm_heads; h++) {
      if ((layer !== ALL && layer !== l) || (head !== ALL && head !== h)) continue;
      parts++;
      for (let i = 0; i < checkpoints; i++) mean[i] += values[(l * meta.norm_heads + h) * checkpoints + i];
    }
  }
  return mean.map((value) => value / parts);
}
