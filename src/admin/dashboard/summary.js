/* What is wrong, and the figures of the last minute. */
/* A backend that was not checked yet is given exchanges, so it counts as available. */
const isAvailable = (backend) => backend.status !== "unhealthy" && backend.breaker !== "open" && !backend.drained;
const isTroubled = (backend) => backend.status === "unhealthy" || backend.breaker !== "closed" || Boolean(backend.alert) || backend.errors_last_minute > 0;
const isHealthy = (backend) => backend.status === "healthy" && isAvailable(backend) && !isTroubled(backend);
const troubleOf = (backend) => backend.alert || backend.why || (backend.errors_last_minute > 0 && backend.last_failure?.why) || "";
const poolName = (pool) => pool.service + " / " + pool.model;
const everyBackend = () => view.pools.flatMap((pool) => pool.backends.map((backend) => ({ pool, backend })));

function someOf(names) {
  const shown = names.slice(0, 3).join(say("comma"));
  return names.length > 3 ? shown + " " + say("more", { n: names.length - 3 }) : shown;
}

function addProblem(list, level, name, names, filter) {
  if (names.length) list.push({ level, filter, text: say(name, { n: names.length, names: someOf(names) }) });
}

function problemsNow() {
  const list = [];
  const all = everyBackend();
  const told = (wanted, tell) => all.filter(({ backend }) => wanted(backend)).map(tell);
  const place = ({ pool, backend }) => backend.name + " (" + poolName(pool) + ")";
  /* Of a single one there is room to say why. */
  const placesOf = (wanted) => {
    const found = all.filter(({ backend }) => wanted(backend));
    return found.map((entry) => place(entry) + (found.length === 1 && troubleOf(entry.backend) ? ": " + troubleOf(entry.backend) : ""));
  };
  const empty = view.pools.filter((pool) => pool.backends.length && !pool.backends.some(isAvailable));
  const last = view.configuration.last_reload;
  addProblem(list, "bad", "poolDown", empty.map(poolName), "problems");
  addProblem(list, "bad", "down", placesOf((backend) => backend.status === "unhealthy"), "problems");
  addProblem(list, "bad", "breakerOpen", placesOf((backend) => backend.breaker === "open" && backend.status !== "unhealthy"), "problems");
  addProblem(list, "bad", "alerts", placesOf((backend) => backend.alert), "problems");
  if (view.minute.error_rate > .05) list.push({ level: "bad", filter: "problems", text: manyErrors(all, place) });
  if (last && last.status === "failed") list.push({ level: "warn", text: say("reloadFailedWith", { problem: (last.problems || [])[0] || say("none") }) });
  if (view.phase === "draining") list.push({ level: "warn", text: say("draining") });
  else if (view.phase !== "ready") list.push({ level: "warn", text: say("phase", { phase: view.phase }) });
  for (const notice of view.notices) list.push({ level: "warn", text: say(notice.what, { n: notice.count, why: notice.why }) });
  addProblem(list, "info", "areDrained", told((backend) => backend.drained, place), "drained");
  if (last && last.needs_restart && last.needs_restart.length) {
    list.push({ level: "info", text: say("needsRestart", { names: last.needs_restart.join(say("comma")) }) });
  }
  if (list.some((problem) => problem.level !== "info")) return list;
  if (all.length === 0) return [{ level: "info", text: say("noBackends") }, ...list];
  return all.every(({ backend }) => isAvailable(backend)) ? [{ level: "good", text: say("allGood") }, ...list] : list;
}

/* How many failed, and where most of the attempts did. */
function manyErrors(all, place) {
  const rate = percent(view.minute.error_rate);
  const worst = all.reduce((one, other) => other.backend.errors_last_minute > (one?.backend.errors_last_minute || 0) ? other : one, null);
  return worst ? say("manyErrorsAt", { rate, place: place(worst), why: worst.backend.last_failure?.why || say("none") }) : say("manyErrors", { rate });
}

function problemLine(problem) {
  const line = element("li", problem.level, element("span", "", problem.text));
  if (!problem.filter) return line;
  const show = element("button", "", say("showThem"));
  show.type = "button";
  show.addEventListener("click", () => {
    byId("state").value = problem.filter;
    byId("filter").value = "";
    showPools(true);
    byId("backends").scrollIntoView();
    byId("state").focus({ preventScroll: true });
  });
  line.append(show);
  return line;
}

function showProblems() {
  const list = problemsNow();
  const box = byId("problems");
  const told = JSON.stringify([language, list]);
  if (box.told === told) return;
  const focusedAt = [...box.querySelectorAll("button")].indexOf(document.activeElement);
  box.told = told;
  box.replaceChildren(...list.map(problemLine));
  if (focusedAt >= 0) (box.querySelectorAll("button")[focusedAt] || byId("state")).focus({ preventScroll: true });
}

function tile(name, value, note, wrong = false) {
  if (!tiles.has(name)) {
    const parts = { value: element("dd"), note: element("dd", "note") };
    parts.box = element("div", "", element("dt", "", say(name)), parts.value, parts.note);
    tiles.set(name, parts);
    byId("tiles").append(parts.box);
  }
  const { box, value: shown, note: small } = tiles.get(name);
  setText(shown, value);
  setText(small, note);
  box.classList.toggle("wrong", wrong);
}

const tail = (times) => times ? say("p95p99", { a: duration(times.p95), b: duration(times.p99) }) : "";

function showTiles() {
  const all = everyBackend();
  const available = all.filter(({ backend }) => isAvailable(backend)).length;
  const counted = view.metrics;
  const minute = counted ? view.minute : {};
  const tokens = isNumber(minute.tokens_input_per_second) ? minute.tokens_input_per_second + minute.tokens_output_per_second : null;
  tile("availability", all.length ? percent(available / all.length) : say("none"), say("ofBackends", { k: available, n: all.length }), available < all.length);
  tile("requestsPerSecond", amount(minute.requests_per_second), counted ? say("sinceStart", { n: view.totals.requests, refused: amount(minute.refused_per_second) }) : "");
  tile("tokensPerSecond", amount(tokens), counted ? say("inAndOut", { a: amount(minute.tokens_input_per_second), b: amount(minute.tokens_output_per_second) }) : "");
  tile("errorRate", percent(minute.error_rate), counted ? say("errorsSinceStart", { n: view.totals.errors, aborts: view.totals.aborts }) : "", minute.error_rate > .05);
  tile("ttfb", duration(minute.ttfb_ms?.p50), tail(minute.ttfb_ms));
  tile("latency", duration(minute.duration_ms?.p50), tail(minute.duration_ms));
  tile("inFlight", whole(view.in_flight), say("connections", { n: view.connections }));
  tile("queued", whole(view.queued), say("waiting"));
  byId("metrics-off").hidden = counted;
}
