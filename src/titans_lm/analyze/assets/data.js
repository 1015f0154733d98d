// The page's numbers: blocks of base64, decoded when they are first used.

const meta = JSON.parse(document.getElementById("meta").textContent);
const T = meta.tokens;

const halves = (() => {  // the number of each float16
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, part = bits & 1023;
    table[bits] = exponent === 31 ? (part ? NaN : sign * Infinity)
      : sign * (exponent ? 2 ** (exponent - 15) * (1 + part / 1024) : 2 ** -24 * part);
  }
  return table;
})();

const blocks = new Map();
for (const block of document.querySelectorAll('script[type="application/octet-stream-base64"]')) {
  blocks.set(block.dataset.name, block);
}
const decoded = new Map();

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// A column as numbers; null if the page has none of this name.
function column(name) {
  if (decoded.has(name)) return decoded.get(name);
  const block = blocks.get(name);
  if (!block) return null;
  const bytes = bytesOf(block.textContent), buffer = bytes.buffer, kind = block.dataset.kind;
  let values;
  if (kind === "float16") {
    const raw = new Uint16Array(buffer), scale = 2 ** (meta.exponents[name] || 0);
    values = new Float32Array(raw.length);
    for (let i = 0; i < raw.length; i++) values[i] = halves[raw[i]] * scale;
  } else {
    const kinds = {uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array};
    values = new kinds[kind](buffer);
  }
  block.textContent = "";  // the text of the block is not needed any more
  decoded.set(name, values);
  return values;
}

const units = column("units"), widths = column("width"), flags = column("flags");
const text = new TextDecoder().decode(column("text"));
const SYMBOL = 1, LINE_END = 2;
const offsets = new Uint32Array(T + 1);
for (let t = 0; t < T; t++) offsets[t + 1] = offsets[t] + units[t];

// The first token of the cell that a token is in, and the token after its last.
function cellOf(token) {
  let first = token, end = token + 1;
  while (first > 0 && units[first] === 0) first--;
  while (end < T && units[end] === 0) end++;
  return [first, end];
}
const cellText = (first) => text.slice(offsets[first], offsets[first + 1]);

// The number of each line, at its first token; 0 elsewhere.
const lineAt = new Uint32Array(T);
{
  const begins = new Set(meta.texts.map((one) => one.start));
  let number = 0;
  for (let t = 0; t < T; t++) {
    if (begins.has(t)) number = 0;
    if (begins.has(t) || (t > 0 && flags[t - 1] & LINE_END)) lineAt[t] = ++number;
  }
}
function place(token) {
  let t = token;
  while (t > 0 && !lineAt[t]) t--;
  const inside = meta.texts.filter((one) => one.start <= token);
  const name = meta.texts.length > 1 ? ` of ${inside[inside.length - 1].name}` : "";
  return `line ${lineAt[t].toLocaleString("en")}${name}`;
}

// ---- measures

const ALL = -1;
const hasHeads = (name) => blocks.has(name) || decoded.has(name);
const MEASURES = [
  {key: "bits", label: "bits", unit: "bits"},
  {key: "bits_frozen", label: "bits, memory frozen", unit: "bits"},
  {key: "effect", label: "bits saved or lost by memory", unit: "bits", diverging: true, needs: "bits_frozen"},
  ...meta.others.map((one, i) => ({
    key: `effect${i}`, label: `change of bits: ${one.label}`, unit: "bits", diverging: true, needs: `other${i}`,
  })),
  {key: "compared", label: `bits: ${meta.compared}`, unit: "bits"},
  {key: "difference", label: `bits less those of ${meta.compared}`, unit: "bits", diverging: true, needs: "compared"},
  {key: "surprise", label: "surprise (reconstruction loss)", heads: true},
  {key: "gradient_norm", label: "gradient norm", heads: true},
  {key: "theta", label: "theta (step)", heads: true},
  {key: "eta", label: "eta (momentum)", heads: true},
  {key: "alpha", label: "alpha (forgetting)", heads: true},
  {key: "output_gate", label: "output gate, mean", heads: true},
  {key: "memory_gate", label: "gate of memory and attention, mean", layers: true},
].filter((one) => hasHeads(one.needs || one.key));

const cache = new Map();

// The values of a measure by token: of a layer and head, or the mean over ALL of them.
function valuesOf(key, layer, head) {
  const measure = MEASURES.find((one) => one.key === key);
  if (!measure) return null;
  const id = `${key} ${measure.heads || measure.layers ? layer : ALL} ${measure.heads ? head : ALL}`;
  if (!cache.has(id)) {
    if (cache.size > 24) cache.clear();
    cache.set(id, computed(measure, layer, head));
  }
  return cache.get(id);
}

function computed(measure, layer, head) {
  if (measure.diverging) {
    const [more, less] = measure.key === "effect" ? ["bits", "bits_frozen"]
      : measure.key === "difference" ? ["bits", "compared"] : [measure.needs, "bits"];
    const a = column(more), b = column(less), start = Math.max(1, startOf(measure.needs));
    return Float32Array.from(a, (value, t) => (t < start ? NaN : value - b[t]));
  }
  const values = column(measure.key);
  if (!measure.heads && !measure.layers) return values;
  const heads = measure.heads ? meta.heads : 1, parts = [];
  const layers = measure.layers ? values.length / T : meta.layers;
  for (let l = 0; l < layers; l++) {
    for (let h = 0; h < heads; h++) {
      if ((layer === ALL || layer === l) && (head === ALL || head === h || heads === 1)) {
        parts.push(values.subarray((l * heads + h) * T, (l * heads + h + 1) * T));
      }
    }
  }
  if (parts.length === 1) return parts[0];
  const mean = new Float32Array(T);
  for (const part of parts) for (let t = 0; t < T; t++) mean[t] += part[t] / parts.length;
  return mean;
}

const startOf = (name) => (/^other\d+$/.test(name) ? meta.others[Number(name.slice(5))].start : 0);

// A number for people, and nothing for what is not one.
function shown(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 100000)) return value.toExponential(2);
  return value.toFixed(size < 1 ? 4 : size < 100 ? 3 : 1);
}
const count = (number) => number.toLocaleString("en");

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
