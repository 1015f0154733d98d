// The page: what is chosen, and the parts that follow it.

const byId = (id) => document.getElementById(id);
const chosen = {measure: "bits", layer: meta.layers > 1 ? ALL : 0, head: meta.heads > 1 ? ALL : 0};
let active = 0;
const panes = [];
const events = {
  hover: (token) => show(token === null ? active : token),
  activate,
  peak: nextPeak,
  mark,
  zoom,
  scrolled: (pane) => {
    for (const other of panes) if (other !== pane && other.grid.scrollTop !== pane.grid.scrollTop) other.grid.scrollTop = pane.grid.scrollTop;
    if (pane === panes[0]) charts.setSight(pane.tokensInSight());
  },
};
const charts = new Charts(byId("charts"), events);

function show(token) {
  byId("panel").replaceChildren(...panelOf(token, chosen.layer, chosen.head));
}

function activate(token, {scroll = false, say = false, focus = false} = {}) {
  active = token;
  const found = meta.sources.find((one) => one.token === token);
  const largest = found ? Math.max(...found.sources.map(([, share]) => Math.abs(share))) : 1;
  const marks = new Map((found ? found.sources : []).map(([source, share]) => [cellOf(source)[0], share]));
  for (const pane of panes) {
    pane.marks = marks;
    pane.setActive(token);
    if (scroll) pane.reveal(token);
    if (found) pane.redraw();
  }
  charts.setArcs(found ? found.sources.map(([source, share]) => ({from: source, to: token, share: Math.abs(share) / largest})) : []);
  charts.setActive(token);
  show(token);
  if (focus) panes[0].grid.focus({preventScroll: false});
  if (say) {
    const value = valuesOf(chosen.measure, chosen.layer, chosen.head)[token];
    byId("said").textContent = `${cellText(cellOf(token)[0])}, token ${count(token)}, ${place(token)}, ${label(chosen.measure)} ${shown(value)}`;
  }
}

const label = (key) => MEASURES.find((one) => one.key === key).label;

// The next token that is among the highest hundredth, after `token`; the first of all at the end.
function nextPeak(token) {
  const values = valuesOf(chosen.measure, chosen.layer, chosen.head);
  const size = (t) => (Number.isFinite(values[t]) ? Math.abs(values[t]) : -1);
  const sizes = Float32Array.from({length: T}, (_, t) => size(t)).sort();
  const least = sizes[Math.floor(0.99 * (T - 1))];
  for (let i = 1; i <= T; i++) {
    const t = (token + i) % T;
    if (size(t) >= least && size(t) > 0 && size(t) >= size((t + 1) % T)) return t;
  }
  return token;
}

function mark(region, follow = true) {
  charts.setRegion(region);
  byId("zoom").disabled = !region;
  byId("whole").disabled = !region && charts.range[0] === 0 && charts.range[1] === T;
  for (const pane of panes) {
    pane.setRegion(region);
    if (region && follow) pane.reveal(region[0], true);
  }
  if (region && follow) activate(region[0]);
}

function zoom(region) {
  if (region && region[1] - region[0] > 1) charts.setRange(region);
  else { charts.setRange([0, T]); mark(null); }
  byId("whole").disabled = charts.range[0] === 0 && charts.range[1] === T && !charts.region;
}

function reshade() {
  const {measure, layer, head} = chosen, entry = MEASURES.find((one) => one.key === measure);
  const shade = levelsOf(valuesOf(measure, layer, head), Boolean(entry.diverging));
  panes[0].setShade(shade);
  if (panes[1]) panes[1].setShade(levelsOf(column("compared"), false));
  const steps = [];
  if (shade.diverging) for (let i = -SIDES; i <= SIDES; i++) steps.push(classOf(i, true));
  else for (let i = 0; i <= LEVELS; i++) steps.push(classOf(i, false));
  const ends = shade.diverging ? [`${shown(-shade.low)} less`, `${shown(shade.high)} more`] : [shown(shade.low), shown(shade.high)];
  byId("scale").replaceChildren(element("span", {text: ends[0]}), ...steps.map((kind) => element("span", {class: `step ${kind}`})), element("span", {text: ends[1]}));
  byId("scale").setAttribute("aria-label", `Shading by ${entry.label}, from ${ends[0]} to ${ends[1]}`);
  byId("layer").disabled = meta.layers === 1;
  byId("head").disabled = meta.heads === 1;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
  if (panes.length) rebuild();
}

function rebuild() {
  charts.build(chosen.layer, chosen.head);
  charts.setActive(active);
}

function choices(id, options, value, changed) {
  byId(id).replaceChildren(...options.map(([key, name]) => element("option", {value: key, text: name})));
  byId(id).value = String(value);
  byId(id).addEventListener("change", () => changed(byId(id).value));
}

function start() {
  byId("title").textContent = meta.title;
  byId("facts").replaceChildren(...meta.facts.map(([name, value]) => element("div", {}, element("dt", {text: name}), element("dd", {text: value}))));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

  const indices = (word, number) => [...(number > 1 ? [[ALL, "all, mean"]] : []), ...Array.from({length: number}, (_, i) => [i, String(i)])];
  choices("measure", MEASURES.map((one) => [one.key, one.label]), chosen.measure, (key) => { chosen.measure = key; reshade(); });
  for (const [id, number] of [["layer", meta.layers], ["head", meta.heads]]) {
    choices(id, indices(id, number), chosen[id], (value) => { chosen[id] = Number(value); reshade(); rebuild(); show(active); });
  }
  byId("go").addEventListener("submit", (event) => {
    event.preventDefault();
    const token = Number(byId("goto").value.replace(/[,. ]/g, ""));
    const fits = Number.isInteger(token) && token >= 0 && token < T;
    byId("goto").setCustomValidity(fits ? "" : `a whole number from 0 to ${count(T - 1)}`);
    if (fits) activate(token, {scroll: true, say: true, focus: true});
    else byId("goto").reportValidity();
  });
  byId("goto").addEventListener("input", () => byId("goto").setCustomValidity(""));
  byId("peak").addEventListener("click", () => activate(nextPeak(active), {scroll: true, say: true}));
  byId("zoom").addEventListener("click", () => zoom(charts.region));
  byId("whole").addEventListener("click", () => zoom(null));

  panes.push(new TextPane("pane", meta.compared === null ? "Text" : "Text, first reading", events));
  byId("panes").append(panes[0].grid);
  if (meta.compared !== null) {
    panes.push(new TextPane("pane2", `Text, shaded by the bits of ${meta.compared}`, events));
    byId("panes").classList.add("two");
    byId("panes").append(panes[1].grid);
    byId("text-title").textContent = `Text, and the same text shaded by bits: ${meta.compared}`;
  }
  for (const pane of panes) pane.layout();
  reshade();
  rebuild();
  byId("lists").replaceChildren(...lists(activate));
  const answer = meta.sources[meta.sources.length - 1];
  activate(answer ? answer.token : 0, {scroll: true});
  new ResizeObserver(() => {
    if (panes.some((pane) => pane.layout())) panes.forEach((pane) => pane.reveal(active, true));
    charts.resize();
  }).observe(byId("panes"));
  document.documentElement.dataset.ready = "true";
}

start();
