// The board: what is shared by its chart, its table and its method pages. All text enters the page as text nodes.
const board = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const methods = new Map(board.methods.map((method) => [method.key, method]));
const SVG = "http://www.w3.org/2000/svg";

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes))
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}
const element = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);
const drawn = (name, attributes = {}, ...children) => filled(document.createElementNS(SVG, name), attributes, children);

// --------------------------------------------------------------------------------------------------- numbers
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
const minus = (text) => text.replace(/-/g, "−");

function number(value) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e5) return minus(new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value));
  return minus(value.toLocaleString("en", size >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 }));
}
const signed = (value) => (value > 0 ? "+" : "") + number(value);
const percent = (share) => (known(share) ? minus(`${(share * 100).toFixed(1)}\u00a0%`) : "–");
// A difference with its sign; one that rounds to nothing has none: "±0".
function differing(value, digits) {
  const text = value.toFixed(digits);
  return Number(text) === 0 ? `±${text.replace("-", "")}` : minus(`${value > 0 ? "+" : ""}${text}`);
}
const points = (share) => `${differing(share * 100, 1)}\u00a0points`;
const change = (ratio) => (ratio >= 2 ? `×\u00a0${number(ratio)}` : `${differing((ratio - 1) * 100, 0)}\u00a0%`);
const mean = (values) => (values && values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

// One figure of a method on the run that is drawn: its mean over units with the lowest and the highest of them.
function figure(method, arm, axis) {
  const values = method.figures[arm] && method.figures[arm][axis];
  return values ? { value: mean(values), low: Math.min(...values), high: Math.max(...values) } : null;
}
const drawnRun = (method) => (method.drawn === null || method.drawn === undefined ? null : method.runs[method.drawn]);
const counts = (method) => method.counts !== null && method.counts !== undefined;

function claimOf(method, run) {
  const literal = (run && run.registered) || method.claim;
  return literal ? { gates: {}, settings: {}, student: "long", seeds: 3, ...literal } : null;
}
function partOf(claim, name) {
  const part = claim && claim.parts.find((one) => one.name === name);
  return part ? { better: "higher", on: "difference", ...part } : null;
}
// What an effect has to beat: the smallest effect worth having, or minus the margin.
const edgeOf = (part) => (part ? (part.test === "superior" ? part.smallest : -part.margin) : null);

// An effect in the terms of its part: a log ratio as a change in per cent, accuracy in points.
function told(value, part, name) {
  if (!known(value)) return "–";
  if (part && part.on === "log ratio") return change(Math.exp(part.better === "lower" ? -value : value));
  return name === "accuracy" ? points(value) : signed(value);
}
// Where problems are the unit, a ratio is the geometric mean of theirs, which is not that of their totals.
const perProblem = (part, claim) => !!part && part.on === "log ratio" && claim.unit === "student";
function interval(effect, part, name) {
  const ends = [told(effect.low, part, name), told(effect.high, part, name)];
  if (part && part.on === "log ratio" && part.better === "lower") ends.reverse();
  return `${ends[0]} to ${ends[1]}`;
}

// --------------------------------------------------------------------------------------------------- statuses
// Shape and colour say the same, so that neither is needed alone.
const MARKS = {
  "shown": ["--right", "M0-6A6 6 0 1 1 0 6A6 6 0 1 1 0-6Z"],
  "refuted": ["--wrong", "M-6-3.4L-3.4-6 0-2.6 3.4-6 6-3.4 2.6 0 6 3.4 3.4 6 0 2.6-3.4 6-6 3.4-2.6 0Z"],
  "inconclusive": ["--check", "M0-7L7 0 0 7-7 0Z"],
  "not carried": ["--branch", "M0-6.5L6.5 5.5-6.5 5.5Z"],
  "stale": ["--soft", "M-5.5-5.5H5.5V5.5H-5.5Z"],
  "built": ["--work", "M-6-2H6V2H-6Z"],
  "missing": ["--faint", "M-4-1H4V1H-4Z"],
  "comparator": ["--ink", "M-4.5-4.5H4.5V4.5H-4.5Z"],
};
function mark(status, hollow = false, extra = {}) {
  const [colour, path] = MARKS[status] || MARKS.built;
  const style = hollow ? `fill: var(--page); stroke: var(${colour}); stroke-width: 1.8` : `fill: var(${colour}); stroke: var(--page); stroke-width: 1`;
  return drawn("path", { d: path, style, ...extra });
}
const badge = (status, words = status) => element("span", { class: "badge" },
  drawn("svg", { viewBox: "-8 -8 16 16", width: 14, height: 14, "aria-hidden": "true" }, mark(status, status === "stale")), words);
const route = (method) => `#/method/${method.key}`;
