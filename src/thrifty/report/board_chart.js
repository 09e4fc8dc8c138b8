// ---------------------------------------------------------------------------------------------------- charts
// Accuracy against a cost. On one work: figures as they are, each comparator beside its method. On all: each method
// against its own comparator, since figures of different work cannot stand side by side.
const ALL = "all";

function pointsOf(shown, work, axis) {
  const found = [];
  for (const method of shown) {
    const run = drawnRun(method);
    if (!run || (work !== ALL && (!method.work || method.work.id !== work))) continue;
    const [x, y, x0, y0] = [["method", axis], ["method", "accuracy"], ["comparator", axis], ["comparator", "accuracy"]]
      .map(([arm, name]) => figure(method, arm, name));
    if (!x || !y) continue;
    if (work !== ALL) {
      found.push({ method, x, y, from: x0 && y0 ? [x0.value, y0.value] : null, kind: method.status, hollow: !counts(method) });
      if (x0 && y0 && !found.some((p) => p.kind === "comparator" && p.x.value === x0.value && p.y.value === y0.value))
        found.push({ method, x: x0, y: y0, from: null, kind: "comparator", hollow: !counts(method) });
    } else if (x0 && y0 && x.value > 0 && x0.value > 0) {
      const one = (value) => ({ value, low: value, high: value });
      found.push({ method, x: one(x.value / x0.value), y: one(y.value - y0.value), from: null, kind: method.status, hollow: !counts(method) });
    }
  }
  return found;
}

// Points that no other beats in both; runs that don't count, or say nothing about the paper, have no say.
const speaks = (p) => !p.hollow && !["not carried", "stale"].includes(p.method.status);
function paretoOf(found) {
  let best = -Infinity;
  return found.filter(speaks).sort((a, b) => a.x.value - b.x.value || b.y.value - a.y.value)
    .filter((p) => p.y.value > best && ((best = p.y.value), true));
}

function ticksOf(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-9) + 1e-12; i += 1) ticks.push(i * step);
  return ticks;
}

function scaleOf(values, size, { log, zero, pad, wanted, ticks }) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const to = log ? Math.log : (v) => v;
  if (zero && !log) low = Math.min(0, low);
  const room = Math.max((to(high) - to(low)) * pad, log ? 0.15 : Math.abs(high) * 0.04 || 0.01);
  const [a, b] = [zero && !log && low === 0 ? 0 : to(low) - room, to(high) + room];
  const place = (value) => ((to(value) - a) / (b - a)) * size;
  const marks = log
    ? (ticks || [1, 2, 5].flatMap((k) => [...Array(40).keys()].map((i) => k * 10 ** (i - 10))).sort((p, q) => p - q))
      .filter((t) => to(t) >= a && to(t) <= b)
    : ticksOf(a, b, wanted);
  return { place, ticks: marks };
}

function frontier(place, shown, work, axis) {
  const found = pointsOf(shown, work, axis);
  // of everything on this work: a filter hides points, it does not make those that are left any better
  const front = paretoOf(pointsOf(board.methods, work, axis));
  const pareto = found.filter((p) => speaks(p) && front.some((f) => f.x.value === p.x.value && f.y.value === p.y.value));
  place.replaceChildren();
  if (!found.length) {
    place.append(element("p", { class: "empty" }, "Nothing to draw: no method that fits the filters has both accuracy and this cost on record."));
    return { found, pareto };
  }
  const width = Math.max(280, place.clientWidth), narrow = width < 600, height = narrow ? 320 : 430;
  const edge = { left: narrow ? 46 : 60, right: narrow ? 12 : 24, top: 14, bottom: 46 };
  const [w, h] = [width - edge.left - edge.right, height - edge.top - edge.bottom];
  const relative = work === ALL;
  const xs = found.flatMap((p) => [p.x.low, p.x.high, ...(p.from ? [p.from[0]] : [])]).concat(front.map((p) => p.x.value), relative ? [1] : []);
  const ys = found.flatMap((p) => [p.y.low, p.y.high, ...(p.from ? [p.from[1]] : [])]).concat(front.map((p) => p.y.value), relative ? [0] : []);
  const log = relative || (Math.min(...xs) > 0 && Math.max(...xs) > 30 * Math.min(...xs));
  const x = scaleOf(xs, w, { log, zero: true, pad: 0.08, wanted: narrow ? 4 : 8, ticks: relative ? [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100] : null });
  const y = scaleOf(ys, h, { pad: 0.12, wanted: narrow ? 5 : 7 });
  const [px, py] = [(v) => edge.left + x.place(v), (v) => edge.top + h - y.place(v)];
  const back = drawn("g", { class: "grid" }), lines = drawn("g"), marks = drawn("g"), labels = drawn("g", { class: "labels" });
  let last = -Infinity;
  for (const t of x.ticks) {
    if (px(t) - last < (narrow ? 44 : 52)) continue;
    last = px(t);
    back.append(drawn("line", { x1: px(t), x2: px(t), y1: edge.top, y2: edge.top + h, class: relative && t === 1 ? "zero" : null }),
      drawn("text", { x: px(t), y: edge.top + h + 18, "text-anchor": "middle" }, relative ? (t === 1 ? "same" : change(t)) : number(t)));
  }
  for (const t of y.ticks)
    back.append(drawn("line", { x1: edge.left, x2: edge.left + w, y1: py(t), y2: py(t), class: relative && Math.abs(t) < 1e-9 ? "zero" : null }),
      drawn("text", { x: edge.left - 8, y: py(t) + 4, "text-anchor": "end" }, relative ? minus(`${t > 0 ? "+" : ""}${+(t * 100).toFixed(2)}`) : `${+(t * 100).toFixed(1)} %`));
  back.append(drawn("text", { x: edge.left + w / 2, y: height - 6, "text-anchor": "middle", class: "axis" },
    (relative ? `${board.axes[axis]}, against the comparator` : board.axes[axis]) + (log && !relative ? " (logarithmic)" : "")));
  if (front.length > 1) {
    const steps = front.map((p, i) => (i ? `H${px(p.x.value)}V${py(p.y.value)}` : `M${px(p.x.value)} ${py(p.y.value)}`)).join("");
    lines.append(drawn("path", { d: steps, class: "front" }));
  }
  const boxes = found.map((p) => [px(p.x.value) - 8, py(p.y.value) - 8, px(p.x.value) + 8, py(p.y.value) + 8]);
  for (const p of found) {
    const at = [px(p.x.value), py(p.y.value)];
    if (p.from) lines.append(drawn("line", { x1: px(p.from[0]), y1: py(p.from[1]), x2: at[0], y2: at[1], class: "from" }));
    lines.append(drawn("line", { x1: px(p.x.low), x2: px(p.x.high), y1: at[1], y2: at[1], class: "range" }),
      drawn("line", { x1: at[0], x2: at[0], y1: py(p.y.low), y2: py(p.y.high), class: "range" }));
    const name = nameOf(p);
    const says = [
      p.kind === "comparator" ? `${name}, the comparator of ${p.method.key}` : `${name}: ${p.method.status}`,
      relative ? `${change(p.x.value)} ${board.axes[axis]}, ${points(p.y.value)} of accuracy` : `${percent(p.y.value)} at ${number(p.x.value)} ${board.axes[axis]}`,
      p.hollow ? "from a run that does not count" : null,
    ].filter(Boolean).join("\n");
    const link = drawn("a", { href: route(p.method), "aria-label": says.replaceAll("\n", ", "), transform: `translate(${at})`, class: "point" },
      drawn("circle", { r: 12, fill: "transparent" }), mark(p.kind, p.hollow));
    tipped(link, says);
    marks.append(link);
  }
  const frame = { left: edge.left, right: edge.left + w, top: edge.top, bottom: edge.top + h };
  const rank = (p) => (pareto.includes(p) ? 0 : p.kind === "comparator" ? 3 : p.hollow ? 2 : 1);
  for (const p of [...found].sort((a, b) => rank(a) - rank(b))) {
    if (narrow && rank(p) > 0) break;
    const label = labelFor(nameOf(p), [px(p.x.value), py(p.y.value)], boxes, frame);
    if (label) labels.append(label);
  }
  place.append(drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": $("chart-title").textContent }, back, lines, labels, marks));
  return { found, pareto };
}

// A label goes to the first free corner; where there is none it is left out: the point says its name when asked.
function labelFor(name, [x, y], boxes, frame) {
  const long = 6.6 * name.length;
  for (const [dx, dy, anchor] of [[10, -6, "start"], [10, 14, "start"], [-10, -6, "end"], [-10, 14, "end"], [0, -13, "middle"], [0, 21, "middle"]]) {
    const left = x + dx - (anchor === "end" ? long : anchor === "middle" ? long / 2 : 0);
    const box = [left, y + dy - 10, left + long, y + dy + 3];
    const outside = box[0] < frame.left || box[2] > frame.right || box[1] < frame.top || box[3] > frame.bottom;
    if (outside || boxes.some((b) => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3])) continue;
    boxes.push(box);
    return drawn("text", { x: x + dx, y: y + dy, "text-anchor": anchor }, name);
  }
  return null;
}

function tipped(target, text) {
  const show = () => {
    const tip = $("tip"), box = target.getBoundingClientRect();
    tip.textContent = text;
    tip.hidden = false;
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${left}px`;
    tip.style.top = `${box.top > tip.offsetHeight + 12 ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
  };
  const hide = () => { $("tip").hidden = true; };
  for (const event of ["mouseenter", "focus"]) target.addEventListener(event, show);
  for (const event of ["mouseleave", "blur", "click"]) target.addEventListener(event, hide);
}

const nameOf = (p) => (p.kind === "comparator" ? comparatorName(p.method) : p.method.key);
function comparatorName(method) {
  const run = drawnRun(method);
  const settings = run && run.settings && run.settings.comparator;
  if (!settings) return "no method";
  const { key, ...rest } = settings;
  return [key || method.key, ...Object.entries(rest).map(([name, value]) => `${name}=${typeof value === "string" ? value : JSON.stringify(value)}`)].join(" ");
}

// Intervals of several effects on one scale, in units of what is worth having: 0 is no effect, ±1 the registered bound.
function forest(rows, edge, width = 420, line = 30, span = null) {
  const unit = Math.abs(edge) || Math.max(...rows.flatMap((r) => [Math.abs(r.effect.low), Math.abs(r.effect.high)])) || 1;
  const ends = rows.flatMap((r) => [r.effect.low, r.effect.high, ...(r.effect.units || [])]).filter(known).map((v) => v / unit);
  const [low, high] = span || [Math.max(-4, Math.min(-0.4, edge < 0 ? -1.5 : 0, ...ends)), Math.min(5, Math.max(0.4, edge > 0 ? 1.5 : 0, ...ends))];
  const place = (value) => 6 + ((Math.min(high, Math.max(low, value / unit)) - low) / (high - low)) * (width - 12);
  const height = rows.length * line;
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "forest", "aria-hidden": "true" },
    drawn("line", { x1: place(0), x2: place(0), y1: 0, y2: height, class: "zero" }),
    known(edge) && edge !== 0 ? drawn("line", { x1: place(edge), x2: place(edge), y1: 0, y2: height, class: "edge" }) : null);
  rows.forEach((row, i) => {
    const y = (i + 0.5) * line, e = row.effect;
    picture.append(drawn("line", { x1: place(e.low), x2: place(e.high), y1: y, y2: y, class: `whisker ${row.kind || ""}` }));
    if (line >= 26) for (const one of e.units || []) picture.append(drawn("line", { x1: place(one), x2: place(one), y1: y + 5, y2: y + 10, class: "unit" }));
    picture.append(drawn("circle", { cx: place(e.value), cy: y, r: line >= 26 ? 4.5 : 3.5, class: `value ${row.kind || ""}` }));
  });
  return picture;
}
