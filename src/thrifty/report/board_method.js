// ----------------------------------------------------------------------------------------------- one method's page
const section = (title, ...children) => element("section", {}, element("h2", {}, title), children);
const paragraph = (text, kind = "lead") => element("p", { class: kind }, text);
const written = (value) => (typeof value === "string" ? value : JSON.stringify(value));
const settingsOf = (settings) => Object.entries(settings || {}).map(([name, value]) => `${name} = ${written(value)}`).join(", ") || "its defaults";

function facts(pairs) {
  return element("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

// A table that becomes a list of labelled lines where there is no room for it.
function grid(headings, rows, kind = "") {
  return element("table", { class: `grid-table ${kind}` },
    element("thead", {}, element("tr", {}, headings.map((h, i) => element("th", { scope: "col", class: i ? null : "name" }, h)))),
    element("tbody", {}, rows.map((row) => element("tr", {}, row.map((cell, i) =>
      (i ? element("td", { "data-name": headings[i] }, cell) : element("th", { scope: "row", class: "name" }, cell)))))));
}

const REASONS = {
  "missing": "Nobody has built this method yet. CONTRIBUTING.md says how to add one.",
  "built": "Built, without a verdict.",
  "stale": "The code has changed since the runs below: nothing on this page speaks for it as it is now.",
};

function methodPage(method) {
  const run = drawnRun(method), claim = claimOf(method, run);
  const page = element("div", { class: "page" });
  page.append(element("header", {},
    element("p", { class: "brand" }, element("b", {}, "thrifty"), " ", element("a", { href: "#/" }, "board"), " ", element("span", {}, method.key)),
    element("h1", { tabindex: "-1" }, method.title),
    facts([
      ["key", element("code", {}, method.key)], ["family", method.family], ["saves", method.saves.join(", ")], ["year", method.year && String(method.year)],
      ["paper", method.arxiv && element("a", { href: `https://arxiv.org/abs/${method.arxiv}`, rel: "noreferrer" }, `arXiv ${method.arxiv}`)],
      ["file", method.file && element("code", {}, method.file)], ["priority", method.priority && String(method.priority)],
    ])));
  const body = element("main");
  page.append(body);
  body.append(verdictOf(method, run, claim));
  if (run && run.parts) body.append(effectsOf(method, run, claim));
  if (method.headline || Object.keys((method.figures || {}).method || {}).length) body.append(besidePaper(method));
  if (run && run.gates) body.append(gatesOf(run, claim));
  if (run && run.notes) body.append(notesOf(run));
  if (claim) body.append(registeredOf(method, run, claim));
  if (method.runs.length) body.append(runsOf(method));
  body.append(againOf(method));
  return page;
}

function verdictOf(method, run, claim) {
  const why = method.why || REASONS[method.status] || "";
  const notes = [];
  if (method.within) notes.push(element("p", { class: "lead" }, "Its code stands in ", element("a", { href: `#/method/${method.within}` }, method.within), ", with its evidence."));
  if (method.status === "built" && !method.within) notes.push(paragraph(method.claim ? (run ? "Its runs do not count: they were tried out, or their file was not committed as it was." : "Its claim has not been run.") : "It registers no claim."));
  if (run && !counts(method)) notes.push(paragraph(`What is drawn here is its latest run (${run.scale}); it does not count.`, "note"));
  if (run && counts(method) && run.added) notes.push(paragraph(`The run that counts was brought in: ${run.where}.`, "note"));
  return element("section", { class: "standing" }, element("p", { class: "status" }, badge(method.status), run && counts(method) ? element("small", {}, ` at scale ${run.scale}`) : null),
    claim ? element("blockquote", {}, claim.says) : null, why ? paragraph(why) : null, notes);
}

function effectsOf(method, run, claim) {
  const rows = run.parts.map((part) => {
    const registered = partOf(claim, part.name), edge = edgeOf(registered), e = part.effect;
    const lines = [{ effect: e, name: "method" }];
    for (const [name, control] of Object.entries(method.controls)) for (const i of control.runs.slice(0, 1)) {
      const other = (method.runs[i].parts || []).find((p) => p.name === part.name);
      if (other) lines.push({ effect: other.effect, name, kind: "control" });
    }
    const bound = !registered ? "not known" : registered.test === "superior" ? `at least ${told(edge, registered, part.name)}` : `no worse than ${told(edge, registered, part.name)}`;
    const total = (arm) => run.units.reduce((sum, unit) => sum + unit[arm][part.name].mean, 0);
    return element("div", { class: "part" },
      element("h3", {}, part.name, element("small", {}, registered ? ` ${registered.test}, ${registered.better} is better` : "")),
      element("div", { class: "drawing" }, element("ul", {}, lines.map((line) => element("li", {}, line.name))), forest(lines, edge)),
      facts([["measured", told(e.value, registered, part.name)], ["ratio of the totals", perProblem(registered, claim) ? change(total("method") / total("comparator")) : null], ["95 % interval", interval(e, registered, part.name)], ["registered", bound],
        ["p, one-sided", e.p < 1e-4 ? "below 0.0001" : number(e.p)], ["observations", number(e.n)],
        ["it would take", part.needed === null ? "more would not settle it: it holds on average, not on every student" : part.held || part.refuted || !part.needed ? null : `about ${number(part.needed)}`],
        ["so this part", part.held ? "holds" : part.refuted ? "is refuted" : "is undecided"]]));
  });
  const has = ["aa", ...controlsOf(run, claim)];
  const controls = Object.entries(method.controls).filter(([name, control]) => has.includes(name) || control.runs.length).map(([name, control]) => [name,
    control.runs.length ? element("span", {}, control.runs.map((i) => method.runs[i].verdict || "no verdict").join(", ")) : "not run",
    { placebo: "must not hold", oracle: "must hold, for a refutation to count", aa: "must differ by chance alone" }[name],
    control["called for"] ? "yes" : "no"]);
  return section("Effects and controls", paragraph("The solid line is no effect, the dashed one the registered bound; small strokes below a bar are students or training seeds. All parts must hold."),
    rows, grid(["control", "came out as", "what it must do", "called for by the verdict"], controls));
}

function besidePaper(method) {
  const names = Object.keys({ ...method.figures.method, ...method.figures.comparator });
  const cell = (arm, name) => {
    const got = figure(method, arm, name), say = name === "accuracy" ? percent : number;
    if (!got) return "not recorded";
    return got.low === got.high ? say(got.value) : element("span", {}, say(got.value), element("small", {}, `${say(got.low)} to ${say(got.high)}`));
  };
  return section("The paper's headline, and ours", facts([["paper", method.headline || "not on file"]]),
    names.length ? grid(["on our problems", method.key, comparatorName(method)], names.map((name) => [board.axes[name] || name, cell("method", name), cell("comparator", name)])) : null);
}

function gatesOf(run, claim) {
  const rows = Object.entries(run.gates).map(([name, values]) => {
    const [low, high] = (claim && claim.gates[name]) || [null, null];
    const fine = values.every((v) => known(v) && (low === null || v >= low) && (high === null || v <= high));
    const bounds = low === null && high === null ? "not known" : high === null ? `at least ${number(low)}` : low === null ? `at most ${number(high)}` : `${number(low)} to ${number(high)}`;
    return [name, values.map(number).join(", "), bounds, claim ? (fine ? "passed" : "failed") : "–"];
  });
  return section("Gates", paragraph("Without these, nothing is said about the paper."), grid(["gate", "per unit", "registered", "so"], rows));
}

const notesOf = (run) => section("Secondary figures", paragraph("Printed without a verdict."),
  grid(["figure", "per unit"], Object.entries(run.notes).map(([name, values]) => [name, values.map(number).join(", ")])));

function tunedTo(run) {
  return run && run.tuned && Object.entries(run.tuned).map(([arm, text]) => `${arm}: ${text}`).join("; ");
}

// The controls that the run called its own; of a claim that has not been run, those that it names.
function controlsOf(run, claim) {
  if (run) return run.controls || [];
  return ["placebo", "oracle"].filter((name) => claim && claim[name] && !`${claim[name]}`.startsWith("none"));
}

function registeredOf(method, run, claim) {
  const has = controlsOf(run, claim);
  const control = (name) => {
    const given = claim[name], none = typeof given === "string" && given.startsWith("none");
    if (!has.includes(name)) return none ? given : null;
    return typeof given === "string" ? given || "the family's" : given && Object.keys(given).length ? settingsOf(given) : "the family's";
  };
  const table = (given) => Object.entries(given || {}).map(([name, values]) => `${name}: ${values.map(written).join(", ")}`).join("; ");
  return section("What is registered", run && !run.registered ? paragraph("The claim was amended after the run that is drawn; this is the one of today.", "note") : null, facts([
    ["method", settingsOf(claim.settings)], ["comparator", claim.comparator ? settingsOf(claim.comparator) : "no method"], ["made equal", claim.match],
    ["tasks", (claim.tasks || []).join(", ")], ["levels", claim.levels && claim.levels.join(", ")], ["student", claim.student], ["problems per unit", number(claim.n)],
    ["units", `${claim.seeds} ${claim.unit === "training" ? "training seeds" : "students"}${claim.students > 1 ? ` on ${claim.students} students` : ""}`], ["tuned on development problems", table(claim.grid)], ["tuned to", tunedTo(run)],
    ["placebo", control("placebo")], ["oracle", control("oracle")], ["amendments", (claim.amendments || []).join("; ")],
  ]));
}

function runsOf(method) {
  const rows = method.runs.map((run, i) => {
    const came = run.error ? "crashed" : run.verdict || "no verdict";
    const units = (run.units || []).flatMap((unit, u) => Object.keys(unit.method).map((part) => [`unit ${u}, ${part}`,
      ...["method", "comparator"].flatMap((arm) => [number(unit[arm][part].mean), element("code", {}, unit[arm][part].hash || "–")]), number(unit.method[part].n),
      Object.entries(unit.method[part].levels || {}).map(([level, value]) => `${level}: ${number(value)}`).join(", ") || "–"]));
    const more = element("details", {}, element("summary", {}, run.error ? "what went wrong" : "settings, units, hashes"),
      run.error ? element("pre", {}, run.error) : null, run.why ? paragraph(run.why) : null,
      facts([["method", run.settings && settingsOf(run.settings.method)], ["comparator", run.settings && (run.settings.comparator ? settingsOf(run.settings.comparator) : "no method")],
        ["tuned to", tunedTo(run)],
        ["seeds", run.seeds ? run.seeds.map(written).join(", ") : "follow from claim and code hash"], ["problems", run.problems && run.problems.map(written).join(", ")],
        ...["claim", "code", "source", "lab", "commit"].map((name) => [name, run[name] ? element("code", {}, run[name]) : name === "commit" ? "none: the file was not committed as it was" : null]),
        ["stands in", element("code", {}, run.where)]]),
      units.length ? grid(["unit and part", "method", "its values", "comparator", "its values", "n", "by level"], units, "units") : null);
    return [element("span", {}, run.time.replace("T", " ").replace("Z", ""), i === method.counts ? element("b", { class: "pareto" }, " counts") : null),
      run.scale, run.control || "method", came, `${number(run.seconds)} s`, more];
  });
  return section("Every run", paragraph("In the order in which they ended, crashes too. Nothing is ever rewritten; the first registered run of a code counts."),
    grid(["ended (UTC)", "scale", "what ran", "came out as", "took", "more"], rows, "runs"));
}

function againOf(method) {
  const run = drawnRun(method);
  if (method.status === "missing") return section("Run it", paragraph("There is nothing to run yet."));
  if (!method.claim) return section("Run it", paragraph(method.file ? "It registers no claim; docs/claims.md says how to write one." : "Its code is not here."));
  const lines = [...(run && run.commit && counts(method) ? [`git checkout ${run.commit}   # the state that was registered`] : []),
    `thrifty reproduce ${method.key}   # the confirm run, then the controls that its verdict calls for`,
    `thrifty reproduce ${method.key} --scale smoke   # a minute or two, no verdict`,
    ...["aa", ...controlsOf(run, method.claim)].map((name) => `thrifty reproduce ${method.key} --control ${name}`)];
  return section("Run it again", element("pre", { tabindex: "0" }, lines.join("\n")));
}
