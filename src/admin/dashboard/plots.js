/* The last half hour, drawn. */
const perSecond = (value) => isNumber(value) ? amount(value) + "/s" : say("none");
const PLOTS = [
  { title: "plotRequests", lines: ["requests", "errors"], names: ["requests", "errors"], tell: perSecond, counted: true },
  { title: "plotTokens", lines: ["tokens_input", "tokens_output"], names: ["tokensIn", "tokensOut"], tell: perSecond, counted: true },
  { title: "plotTtfb", lines: ["ttfb_p50", "ttfb_p95"], names: ["p50", "p95"], tell: duration, counted: true },
  { title: "plotLatency", lines: ["duration_p50", "duration_p95"], names: ["p50", "p95"], tell: duration, counted: true },
  { title: "plotLoad", lines: ["in_flight", "queued"], names: ["flying", "waitingShort"], tell: amount, counted: false },
];
const WIDTH = 600;
const HEIGHT = 100;
const LEAST_POINTS = 60;

function makePlot(kind) {
  const plot = { kind, back: null, strokes: [], values: [] };
  const image = drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  for (const y of [0, HEIGHT / 2, HEIGHT]) image.append(drawing("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y }));
  plot.area = drawing("path", { class: "area" });
  plot.strokes = ["stroke", "stroke second"].map((name) => drawing("path", { class: name }));
  plot.cursor = drawing("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
  image.append(plot.area, ...plot.strokes, plot.cursor);
  plot.image = image;
  plot.values = kind.names.map(() => element("b"));
  plot.max = element("span", "max");
  plot.none = element("span", "none");
  plot.when = element("span");
  plot.start = element("span");
  plot.canvas = element("div", "canvas", image, plot.max, plot.none);
  plot.node = element("figure", "", element("figcaption", "", say(kind.title)),
    element("p", "legend", ...kind.names.map((name, at) => element("span", "", say(name) + " ", plot.values[at]))),
    plot.canvas, element("div", "times", plot.start, plot.when));
  watchCursor(plot);
  return plot;
}

function watchCursor(plot) {
  const move = (event) => {
    const box = plot.canvas.getBoundingClientRect();
    plot.back = Math.round((1 - (event.clientX - box.left) / box.width) * (plot.span - 1));
    showPlotValues(plot);
  };
  plot.canvas.addEventListener("pointermove", move);
  plot.canvas.addEventListener("pointerdown", move);
  plot.canvas.addEventListener("pointerleave", () => {
    plot.back = null;
    showPlotValues(plot);
  });
}

/* A round number that holds the greatest value. */
function ceiling(values) {
  const most = Math.max(0, ...values.filter(isNumber));
  if (most === 0) return 1;
  const unit = 10 ** Math.floor(Math.log10(most));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((times) => times * unit >= most) * unit;
}

/* Runs of points without a gap. */
function runsOf(values, point) {
  const runs = [];
  let run = null;
  values.forEach((value, at) => {
    if (!isNumber(value)) run = null;
    else if (run) run.push(point(value, at));
    else runs.push(run = [point(value, at)]);
  });
  return runs;
}

const asLine = (run) => "M" + run.join("L") + (run.length === 1 ? "h.1" : "");
const asArea = (run) => `M${run[0].split(" ")[0]} ${HEIGHT}L${run.join("L")}V${HEIGHT}Z`;

function whyEmpty(kind, lines) {
  if (kind.counted && !view.metrics) return say("metricsOff");
  if (lines.every((values) => values.length === 0)) return say("noHistory");
  if (kind.counted && view.totals.requests === 0) return say("noRequests");
  return lines.every((values) => !values.some(isNumber)) ? say("noRequestsHere") : "";
}

function showPlot(plot) {
  const { kind } = plot;
  const lines = kind.lines.map((name) => view.history[name] || []);
  const empty = whyEmpty(kind, lines);
  const length = Math.max(...lines.map((values) => values.length));
  const most = ceiling(lines.flat());
  plot.lines = empty ? [[], []] : lines;
  plot.span = Math.max(LEAST_POINTS, length);
  plot.lines.forEach((values, at) => {
    const point = (value, index) =>
      ((plot.span - values.length + index) / (plot.span - 1) * WIDTH).toFixed(1) + " " + (HEIGHT - value / most * HEIGHT).toFixed(1);
    const runs = runsOf(values, point);
    plot.strokes[at].setAttribute("d", runs.map(asLine).join(""));
    if (at === 0) plot.area.setAttribute("d", runs.map(asArea).join(""));
  });
  setText(plot.none, empty);
  setText(plot.max, empty ? "" : kind.tell(most));
  setText(plot.start, clock(timeBack(plot.span - 1)));
  const latest = kind.names.map((name, at) => say(name) + " " + kind.tell(plot.lines[at].at(-1))).join(say("comma"));
  setAttribute(plot.image, "aria-label", empty ? say(kind.title) + ": " + empty
    : say("chartLabel", { title: say(kind.title), n: Math.round(plot.span * view.history.step_seconds / 60), values: latest }));
  showPlotValues(plot);
}

const timeBack = (steps) => Date.parse(view.history.end || view.now) - steps * view.history.step_seconds * 1000;

/* The legend tells the latest values, or those under the cursor. */
function showPlotValues(plot) {
  const pointed = plot.back !== null;
  const back = Math.min(plot.span - 1, Math.max(0, plot.back ?? 0));
  plot.values.forEach((node, at) => setText(node, plot.kind.tell(plot.lines[at].at(-1 - back))));
  setText(plot.when, pointed ? clock(timeBack(back), { timeStyle: "medium" }) : clock(timeBack(0)));
  const x = String((plot.span - 1 - back) / (plot.span - 1) * WIDTH);
  plot.cursor.setAttribute("x1", x);
  plot.cursor.setAttribute("x2", x);
  plot.cursor.setAttribute("visibility", pointed ? "visible" : "hidden");
}

function showPlots() {
  if (plots.length === 0) {
    plots = PLOTS.map(makePlot);
    byId("plots").replaceChildren(...plots.map((plot) => plot.node));
  }
  plots.forEach(showPlot);
}
