// ------------------------------------------------------------------------------------------- filters and table
const ORDER = ["shown", "refuted", "inconclusive", "not carried", "stale", "built", "missing"];
const state = { sort: "verdict", ascending: true, found: [], pareto: new Set(), top: 0 };

const COLUMNS = {
  method: { title: "Method", value: (m) => m.key, cell: (m) => [element("a", { href: route(m) }, m.key), state.pareto.has(m) ? element("span", { class: "pareto", title: "in the Pareto set" }, " ◆") : null, element("small", {}, m.title)] },
  verdict: { title: "Verdict", value: (m) => ORDER.indexOf(m.status), cell: (m) => [badge(m.status), counts(m) ? element("small", {}, drawnRun(m).scale) : null] },
  effect: { title: "Effect, 95 % interval", value: (m) => { const p = firstPart(m); return p ? p.effect.value / (Math.abs(edgeOf(p.registered)) || 1) : null; }, cell: effectCell },
  controls: { title: "Controls", value: (m) => Object.values(m.controls).filter((c) => c.runs.length).length || null, cell: controlsCell },
  accuracy: { title: "Accuracy", value: (m) => (figure(m, "method", "accuracy") || {}).value, cell: (m) => against(m, "accuracy", percent, (a, b) => points(a - b)) },
  cost: { title: "", value: (m) => (figure(m, "method", $("axis").value) || {}).value, cell: (m) => against(m, $("axis").value, number, (a, b) => (b > 0 ? change(a / b) : "–")) },
  headline: { title: "Paper's headline", value: (m) => m.headline, cell: (m) => [m.headline ? element("small", {}, m.headline) : "–"] },
  family: { title: "Family, saves", value: (m) => m.family, cell: (m) => [m.family, element("small", {}, m.saves.join(", "))] },
};
if (!board.methods.some((m) => m.headline)) delete COLUMNS.headline;

function firstPart(method) {
  const run = drawnRun(method), part = run && run.parts && run.parts[0];
  return part ? { ...part, registered: partOf(claimOf(method, run), part.name) } : null;
}
function effectCell(method) {
  const part = firstPart(method);
  if (!part) return ["–"];
  const all = drawnRun(method).parts, edge = edgeOf(part.registered);
  const typical = perProblem(part.registered, claimOf(method, drawnRun(method))) ? " per problem" : "";
  const words = `${part.name} ${told(part.effect.value, part.registered, part.name)}${typical}, ${interval(part.effect, part.registered, part.name)}`;
  return [forest([{ effect: { ...part.effect, units: [] }, kind: counts(method) ? "" : "control" }], edge, 150, 18, [-2, 3]),
    element("small", {}, words), all.length > 1 ? element("small", {}, `${all.filter((p) => p.held).length} of ${all.length} parts hold`) : null];
}
function controlsCell(method) {
  const done = Object.entries(method.controls).filter(([, control]) => control.runs.length || control["called for"]);
  return done.length ? done.map(([name, control]) => element("small", {}, `${name}: ${control.runs.length ? method.runs[control.runs[0]].verdict || "no verdict" : "not run"}`)) : ["–"];
}
function against(method, name, say, compare) {
  const [own, other] = [figure(method, "method", name), figure(method, "comparator", name)];
  if (!own) return ["–"];
  return [say(own.value), other ? element("small", {}, `${compare(own.value, other.value)} against ${say(other.value)}`) : null];
}


function rowOf(method) {
  return element("tr", { class: method.status === "missing" ? "missing" : null }, Object.entries(COLUMNS).map(([name, column], i) =>
    element(i ? "td" : "th", { scope: i ? null : "row", class: i ? name : "name", "data-name": name === "cost" ? board.axes[$("axis").value] : column.title }, column.cell(method))));
}

const ticked = () => new Set([...$("statuses").querySelectorAll("input:checked")].map((box) => box.value));
function matches(method) {
  const words = $("search").value.trim().toLowerCase().split(/\s+/), text = `${method.key} ${method.title}`.toLowerCase();
  return words.every((word) => text.includes(word))
    && (!$("family").value || method.family === $("family").value) && (!$("saves").value || method.saves.includes($("saves").value));
}

function draw() {
  const statuses = ticked(), shown = board.methods.filter((m) => statuses.has(m.status) && matches(m));
  const work = $("work").value, axis = $("axis").value;
  for (const option of $("axis").options)
    option.textContent = `${board.axes[option.value]} (${pointsOf(board.methods, work, option.value).filter((p) => p.kind !== "comparator").length})`;
  const name = board.axes[axis];
  $("chart-title").textContent = work === ALL ? `Change of accuracy against change of ${name}` : `Accuracy against ${name}`;
  $("chart-lead").textContent = work === ALL
    ? "Each method against its own comparator, whatever it was measured on: up and to the left is better."
    : "Up and to the left is better. Bars reach from the lowest to the highest student or seed; a thin line joins a method with its comparator; the stepped line is the Pareto set of all of them, whatever is filtered.";
  const { found, pareto } = frontier($("chart"), shown, work, axis);
  state.pareto = new Set(pareto.filter((p) => p.kind !== "comparator").map((p) => p.method));
  const kinds = [...ORDER, "comparator"].filter((kind) => found.some((p) => p.kind === kind));
  $("legend").replaceChildren(...kinds.map((kind) => element("li", {}, badge(kind))), ...(found.some((p) => p.hollow && p.kind !== "comparator") ? [element("li", {}, "hollow: does not count")] : []));
  const here = new Set(found.map((p) => p.method)), without = shown.filter((m) => m.status !== "missing" && !here.has(m));
  $("without").replaceChildren();
  if (without.length) $("without").append(work === ALL ? `Without both figures in both arms: ` : `Not measured on this work, or without a figure: `,
    ...without.flatMap((m, i) => [i ? ", " : "", element("a", { href: route(m) }, m.key)]), ".");
  table(shown);
}

function table(shown) {
  const column = COLUMNS[state.sort], way = state.ascending ? 1 : -1;
  const keyed = shown.map((m) => [column.value(m), m]);
  const unknown = (v) => v === null || v === undefined || v === "";
  keyed.sort(([a], [b]) => {
    if (unknown(a) || unknown(b)) return unknown(a) - unknown(b);  // unknown goes last either way
    return (typeof a === "string" ? a.localeCompare(b) : a - b) * way;
  });
  const body = $("board").tBodies[0];
  body.replaceChildren(...keyed.map(([, m]) => rowOf(m)));
  $("nothing").hidden = shown.length > 0;
  if (!shown.length) $("nothing").textContent = nothing();
  $("board").querySelectorAll("thead th").forEach((th) => {
    if (th.dataset.column === "cost") th.firstChild.textContent = capital(board.axes[$("axis").value]);
    th.removeAttribute("aria-sort");
    if (th.dataset.column === state.sort) th.setAttribute("aria-sort", state.ascending ? "ascending" : "descending");
  });
  $("sort").value = state.sort;
}
// Why no method is shown, with the statuses that hide some.
function nothing() {
  const found = board.methods.filter(matches);
  const hidden = [...new Set([...ORDER, ...board.statuses])].map((status) => [status, found.filter((m) => m.status === status).length]).filter(([, some]) => some);
  return hidden.length
    ? `No method with a ticked status fits these filters. Tick ${hidden.map(([status, some]) => `“${status}” (${some})`).join(" or ")} under status to show those that do.`
    : "No method fits these filters.";
}
const capital = (text) => text[0].toUpperCase() + text.slice(1);

function sortBy(name, turn = true) {
  state.ascending = state.sort === name && turn ? !state.ascending : true;
  state.sort = name;
  draw();
}

// ------------------------------------------------------------------------------------------------------ start
function options(select, pairs) { select.replaceChildren(...pairs.map(([value, text]) => element("option", { value }, text))); }

function start() {
  options($("family"), [["", "all"], ...board.families.map((f) => [f, f])]);
  options($("saves"), [["", "anything"], ...board.saves.map((s) => [s, s])]);
  for (const status of [...ORDER, ...board.statuses.filter((s) => !ORDER.includes(s))]) {
    const some = board.methods.filter((m) => m.status === status).length;
    if (some) $("statuses").append(element("label", {}, element("input", { type: "checkbox", value: status, checked: status !== "missing" }), badge(status, `${status} ${some}`)));
  }
  options($("axis"), Object.entries(board.axes));
  const works = new Map();
  for (const m of board.methods) if (m.work && figure(m, "method", "accuracy")) works.set(m.work.id, (works.get(m.work.id) || 0) + 1);
  const sorted = [...works].sort((a, b) => b[1] - a[1]);
  options($("work"), [...sorted.map(([id, some]) => [id, `${id} (${some})`]), [ALL, "all work, each against its comparator"]]);
  $("work").value = sorted.length === 1 ? sorted[0][0] : ALL;
  $("board").tHead.rows[0].append(...Object.entries(COLUMNS).map(([name, column], i) => {
    const button = element("button", { type: "button" }, column.title);
    button.addEventListener("click", () => sortBy(name));
    return filled(element("th", { scope: "col", class: i ? name : "name" }, button), { "data-column": name }, []);
  }));
  options($("sort"), Object.entries(COLUMNS).map(([name, column]) => [name, column.title || "cost"]));
  $("sort").addEventListener("change", () => sortBy($("sort").value, false));
  for (const id of ["search", "filters", "work", "axis"]) $(id).addEventListener(id === "search" ? "input" : "change", draw);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", show);
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName) && !$("list").hidden) { event.preventDefault(); $("search").focus(); }
    if (event.key === "Escape" && $("list").hidden) location.hash = "#/";
  });
  let width = 0;
  new ResizeObserver(() => {
    if ($("list").hidden || $("chart").clientWidth === width) return;
    width = $("chart").clientWidth;
    draw();
  }).observe($("chart"));
  draw();
  show();
}

// "#/method/KEY" is a method's page; anything else is the board.
function show() {
  const [, key] = location.hash.match(/^#\/method\/(.+)$/) || [];
  const method = key && methods.get(decodeURIComponent(key));
  const was = $("list").hidden;
  if (!was) state.top = scrollY;
  $("list").hidden = Boolean(key);
  $("method").hidden = !key;
  $("tip").hidden = true;
  if (key) {
    $("method").replaceChildren(method ? methodPage(method) : element("header", {}, element("h1", { tabindex: "-1" }, `There is no method “${key}” on this board.`), element("a", { href: "#/" }, "All methods")));
    document.title = `${key} · thrifty`;
    scrollTo({ top: 0, behavior: "instant" });
    $("method").querySelector("h1").focus({ preventScroll: true });
    state.last = key;
  } else {
    document.title = "Board · thrifty";
    $("method").replaceChildren();
    if (was) {
      scrollTo({ top: state.top, behavior: "instant" });
      const link = [...$("board").querySelectorAll("th a")].find((a) => a.textContent === state.last);
      if (link) link.focus({ preventScroll: true });
    }
  }
}
start();
