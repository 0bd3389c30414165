/* Pools and their backends, filtered and sorted. */
const severity = (backend) => backend.status === "unhealthy" ? 6 : backend.breaker === "open" ? 5 : backend.alert ? 4
  : backend.breaker === "half_open" ? 3 : backend.status === "unknown" ? 2 : backend.drained ? 1 : 0;
const sumOf = (pool) => pool.backends.reduce((sum, backend) => sum + backend.requests_last_minute, 0);
const SORTS = {
  state: { down: true, value: severity },
  name: { down: false, value: null },
  inflight: { down: true, value: (backend) => backend.in_flight },
  response: { down: true, value: (backend) => backend.response_time_ms ?? -1 },
  share: { down: true, value: (backend) => backend.requests_last_minute },
  failures: { down: true, value: (backend) => backend.errors_last_minute },
};
const COLUMNS = [
  { id: "state", text: "state", sort: "state" },
  { id: "name", text: "backend", sort: "name" },
  { id: "url", text: "url", style: "url" },
  { id: "inflight", text: "inFlight", sort: "inflight", style: "number" },
  { id: "response", text: "response", sort: "response", style: "number" },
  { id: "share", text: "share", sort: "share", style: "number" },
  { id: "failures", text: "failures", sort: "failures", style: "number" },
  { id: "check", text: "check", style: "number" },
  { id: "action", text: "action", style: "number" },
];

/* Roles are given because cards on a narrow screen would lose the table's own. */
function tableOf(columns) {
  const head = element("tr", "", ...columns.map(headCell));
  const body = element("tbody");
  const table = element("table", "", element("thead", "", head), body);
  setAttribute(table, "role", "table");
  setAttribute(head, "role", "row");
  setAttribute(body, "role", "rowgroup");
  return { table, body, head };
}

function headCell(column) {
  const cell = element("th", "c-" + column.id + " " + (column.style || ""));
  cell.scope = "col";
  setAttribute(cell, "role", "columnheader");
  if (!column.sort) {
    cell.append(say(column.text));
    return cell;
  }
  const button = element("button", "", say(column.text));
  button.type = "button";
  button.addEventListener("click", () => sortBy(column.sort));
  cell.dataset.sort = column.sort;
  cell.append(button);
  return cell;
}

function rowOf(columns) {
  const cells = {};
  const node = element("tr", "", ...columns.map((column) => {
    const cell = element("td", "c-" + column.id + " " + (column.style || ""));
    cell.dataset.label = say(column.text);
    setAttribute(cell, "role", "cell");
    cells[column.id] = cell;
    return cell;
  }));
  setAttribute(node, "role", "row");
  return { node, cells };
}

function sortBy(name) {
  sorting.down = sorting.by === name ? !sorting.down : SORTS[name].down;
  sorting.by = name;
  byId("sort").value = name;
  showPools(true);
}

function compareBackends(one, other) {
  const value = SORTS[sorting.by].value;
  const names = formatter(Intl.Collator, { numeric: true });
  const byName = names.compare(one.name, other.name) || names.compare(one.id, other.id);
  if (!value) return sorting.down ? -byName : byName;
  return (sorting.down ? value(other) - value(one) : value(one) - value(other)) || byName;
}

function stateWords(backend) {
  return [backend.status, backend.breaker === "closed" ? "" : backend.breaker, backend.drained ? "drained" : ""].filter(Boolean);
}

/* State words match from their start, so that "healthy" does not find the unhealthy. */
function matches(pool, backend, words) {
  const text = [pool.service, pool.model, backend.id, backend.name, backend.url].join("\n").toLowerCase();
  const states = stateWords(backend).flatMap((state) => [state, ...say(state).split(" "), ...TEXT.en[state].split(" ")]);
  return words.every((word) => text.includes(word) || states.some((state) => state.startsWith(word)));
}

const STATES = { all: () => true, problems: isTroubled, healthy: isHealthy, drained: (backend) => backend.drained };

function pill(state) {
  const node = element("span", "state " + state, say(state));
  const meaning = { open: "openMeans", half_open: "halfOpenMeans", unknown: "unknownMeans", drained: "drainedMeans" }[state];
  if (meaning) node.title = say(meaning);
  return node;
}

function makeBackend() {
  const row = rowOf(COLUMNS);
  const { cells } = row;
  row.name = element("span");
  row.id = element("span", "id");
  row.alert = element("span", "alert");
  cells.name.append(row.name, " ", row.id, row.alert);
  row.share = element("span");
  row.fill = element("i");
  cells.share.append(row.share, element("span", "part", row.fill));
  row.check = element("time");
  cells.check.append(row.check);
  row.button = element("button");
  row.button.type = "button";
  row.button.addEventListener("click", () => changeDrain(row));
  cells.action.append(row.button);
  return row;
}

function updateBackend(row, pool, backend, sum) {
  const { cells } = row;
  row.pool = pool;
  row.backend = backend;
  const states = stateWords(backend);
  if (row.states !== states.join()) {
    row.states = states.join();
    cells.state.replaceChildren(...states.map(pill));
  }
  setText(row.name, backend.name);
  setText(row.id, backend.id === backend.name ? "" : backend.id);
  const again = isNumber(backend.left_alone_seconds) ? " (" + say("leftAlone", { n: backend.left_alone_seconds }) + ")" : "";
  setText(row.alert, troubleOf(backend) + (troubleOf(backend) ? again : ""));
  row.alert.hidden = !troubleOf(backend);
  setText(cells.url, backend.url);
  setText(cells.inflight, backend.inflight_max > 0 ? backend.in_flight + " / " + backend.inflight_max : String(backend.in_flight));
  setText(cells.response, duration(backend.response_time_ms));
  const share = view.metrics && sum > 0 ? backend.requests_last_minute / sum : null;
  setText(row.share, percent(share));
  row.fill.style.width = 100 * (share || 0) + "%";
  setText(cells.failures, view.metrics ? whole(backend.errors_last_minute) : say("none"));
  cells.failures.classList.toggle("wrong", backend.errors_last_minute > 0);
  showTime(row.check, backend.last_check);
  updateAction(row, backend, pool);
}

function updateAction(row, backend, pool) {
  row.button.hidden = !view.can_change;
  setText(row.button, say(backend.drained ? "undrain" : "drain"));
  setAttribute(row.button, "aria-label", say(backend.drained ? "undrainThis" : "drainThis", { name: backend.name, pool: poolName(pool) }));
  setAttribute(row.button, "aria-disabled", String(busy.has(backendKey(pool, backend))));
}

/* Its text is an age, kept right by tellAges. */
function showTime(node, at) {
  if (node.getAttribute("datetime") !== (at || "")) {
    node.setAttribute("datetime", at || "");
    node.title = at ? dateAndTime(at) : "";
  }
  setText(node, at ? ageOf(at) : say("notYet"));
}

const backendKey = (pool, backend) => JSON.stringify([pool.service, pool.model, backend.id]);

function makePool(pool) {
  const { table, body, head } = tableOf(COLUMNS);
  const entry = { body, head, rows: new Map(), facts: element("small"), wrong: element("small", "wrong") };
  const title = element("h2", "", poolName(pool), entry.facts, entry.wrong);
  entry.node = element("section", "card pool", title, element("div", "scroll", table));
  setAttribute(entry.node, "aria-label", poolName(pool));
  return entry;
}

function updatePool(entry, pool, wanted, chosen) {
  const available = pool.backends.filter(isAvailable).length;
  setText(entry.facts, [say("poolFacts", { percent: pool.backends.length ? percent(available / pool.backends.length) : say("none"), k: available, n: pool.backends.length }),
    ...(view.metrics ? [say("poolRate", { n: pool.requests_last_minute })] : []), say("poolQueued", { n: pool.queued })].join(" · "));
  setText(entry.wrong, view.metrics && pool.errors_last_minute > 0 ? say("poolErrors", { n: pool.errors_last_minute }) : "");
  const sum = sumOf(pool);
  const rows = syncEntries(entry.rows, pool.backends, (backend) => backend.id, makeBackend, (row, backend) => updateBackend(row, pool, backend, sum));
  entry.shown = 0;
  for (const row of rows) {
    const found = wanted(pool, row.backend);
    if (found) entry.shown += 1;
    row.node.hidden = !found && !row.node.contains(document.activeElement);
  }
  /* Rows do not move away from under a pointer or the focus unless the sorting was asked for. */
  if (chosen || !isHeld(entry) || rows.some((row) => !row.node.isConnected)) {
    rows.sort((one, other) => compareBackends(one.backend, other.backend));
    arrange(entry.body, rows.map((row) => row.node));
  }
  for (const cell of entry.head.children) {
    if (cell.dataset.sort) setAttribute(cell, "aria-sort", cell.dataset.sort !== sorting.by ? "none" : sorting.down ? "descending" : "ascending");
  }
  entry.node.hidden = !rows.some((row) => !row.node.hidden) && pool.backends.length + (byId("filter").value.length) > 0;
}

const canHover = matchMedia("(hover: hover)");
const isHeld = (entry) => entry.body.matches(canHover.matches ? ":hover, :focus-within" : ":focus-within");

function showPools(chosen = false) {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const state = STATES[byId("state").value];
  const wanted = (pool, backend) => state(backend) && matches(pool, backend, words);
  const list = syncEntries(pools, view.pools, (pool) => JSON.stringify([pool.service, pool.model]), makePool,
    (entry, pool) => updatePool(entry, pool, wanted, chosen));
  arrange(byId("pools"), list.map((entry) => entry.node));
  const shown = list.reduce((sum, entry) => sum + entry.shown, 0);
  const all = everyBackend();
  const missing = all.filter(({ backend }) => !isAvailable(backend)).length;
  setText(byId("count"), say("countOf", { k: shown, n: all.length }));
  byId("no-match").hidden = shown > 0 || all.length === 0;
  document.title = missing ? say("titleDown", { n: missing }) : "Tollgate";
}
