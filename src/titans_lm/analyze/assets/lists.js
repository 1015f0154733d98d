// The token's numbers, and lists of lines and tokens to go to.

function panelOf(token, layer, head) {
  const [first, end] = cellOf(token), parts = [];
  const name = element("p", {class: "token"},
    element("span", {class: flags[first] & SYMBOL ? "glyph symbol" : "glyph", text: cellText(first)}),
    element("span", {text: ` token ${count(token)}, ${place(token)}`}));
  parts.push(name);
  if (end - first > 1) parts.push(element("p", {class: "hint", text: `part ${token - first + 1} of the ${end - first} tokens of this character`}));
  const rows = [];
  const add = (label, value, key) => rows.push(element("div", {}, element("dt", {text: label}), element("dd", {text: shown(value), "data-value": key})));
  add("bits", column("bits")[token], "bits");
  if (column("bits_frozen")) {
    add("bits, memory frozen", column("bits_frozen")[token], "bits_frozen");
    add("changed by memory", column("bits")[token] - column("bits_frozen")[token], "effect");
  }
  meta.others.forEach((one, i) => { if (token >= one.start) add(one.label, column(`other${i}`)[token], `other${i}`); });
  if (column("compared")) add(meta.compared, column("compared")[token], "compared");
  for (const measure of MEASURES) {
    if (measure.heads || measure.layers) add(measure.label.replace(/ \(.*|, mean/, ""), valuesOf(measure.key, layer, head)[token], measure.key);
  }
  const checkpoints = column("checkpoint");
  let last = 0;
  while (last + 1 < checkpoints.length && checkpoints[last + 1] <= token) last++;
  add("norm of memory", normsOf("memory_norm", layer, head)[last], "memory_norm");
  add("norm of momentum", normsOf("momentum_norm", layer, head)[last], "momentum_norm");
  parts.push(element("p", {class: "which", text: `Of ${whichHead(layer, head)}; norms after ${count(checkpoints[last])} tokens.`}));
  parts.push(element("dl", {class: "numbers"}, ...rows));
  const guesses = [["with memory", ""], ["memory frozen", "_frozen"]].filter(([, suffix]) => meta.top && column(`prediction${suffix}`));
  if (guesses.length) parts.push(element("div", {class: "guesses"}, ...guesses.map(([label, suffix]) => guessesOf(token, label, suffix))));
  return parts;
}

function guessesOf(token, label, suffix) {
  const ids = column(`prediction${suffix}`), chance = column(`probability${suffix}`), items = [];
  for (let i = token * meta.top; i < (token + 1) * meta.top; i++) {
    const word = meta.vocabulary[ids[i]];
    if (word === undefined) continue;
    const bar = element("meter", {min: 0, max: 1, value: chance[i], "aria-label": "probability"});
    items.push(element("li", {}, element("span", {class: "word", text: word === " " ? "\u2423" : word}), bar, element("span", {class: "chance", text: `${(100 * chance[i]).toFixed(1)}%`})));
  }
  return element("div", {}, element("h3", {text: `Predicted, ${label}`}), items.length ? element("ol", {}, ...items) : element("p", {class: "hint", text: "nothing: it is the first token"}));
}

// Some text around a token, without line ends.
function around(token, before, after) {
  let first = token, end = token;
  while (first > 0 && token - first < before && !(flags[first - 1] & LINE_END)) first--;
  while (end < T && end - token < after && !(flags[end] & LINE_END)) end++;
  [first] = cellOf(first);
  const [cell] = cellOf(token), next = nextCell(cell);
  return [text.slice(offsets[first], offsets[cell]), cellText(cell), text.slice(offsets[Math.min(next, T)], offsets[Math.max(end, Math.min(next, T))])];
}

function listOf(title, note, items) {
  return element("section", {}, element("h2", {text: title}), element("p", {class: "hint", text: note}),
    items.length ? element("ol", {}, ...items) : element("p", {text: "none"}));
}

function lists(activate) {
  const item = (token, value, where, [before, word, after]) => element("li", {}, element("button", {type: "button", "data-go": token, onclick: () => activate(token, {scroll: true, focus: true})},
    element("span", {class: "value", text: value}), element("span", {class: "where", text: where}),
    element("span", {class: "words"}, before, element("mark", {text: word}), after)));
  const parts = [listOf("Most surprising lines", "Bits per byte, line, text.", meta.lines.map(([token, line, value]) => {
    const [, first, rest] = around(token, 0, 90);
    return item(token, value.toFixed(2), meta.texts.length > 1 ? place(token) : `line ${count(line)}`, ["", "", first + rest]);
  }))];
  const signed = (value) => `${value > 0 ? "+" : "\u2212"}${Math.abs(value).toFixed(2)}`;
  for (const [key, title, note] of [["helped", "Memory helped most", "Bits saved at a token by what was read before it."], ["hurt", "Memory hurt most", "Bits lost."]]) {
    if (meta[key]) parts.push(listOf(title, note, meta[key].map(([token, value]) => item(token, signed(value), place(token), around(token, 30, 30)))));
  }
  if (meta.sources.length) parts.unshift(sourcesList(item));
  return parts;
}

function sourcesList(item) {
  const items = meta.sources.flatMap((one) => one.sources.map(([token, share]) => {
    const [, word] = around(one.token, 0, 1);
    return item(token, `${share > 0 ? "+" : "\u2212"}${shown(Math.abs(share))}`, `token ${count(token)} for \u201c${word}\u201d at ${count(one.token)}`, around(token, 20, 20));
  }));
  return listOf("Where answers come from", `Share of earlier tokens in the prediction of an answer: ${meta.sources[0].method}.`, items);
}
