/* Failures, keys, configuration. */
const orNone = (value) => value ? String(value) : say("none");
const ERROR_COLUMNS = [
  { id: "time", text: "time", at: (error) => error.at },
  { id: "times", text: "times", style: "number", tell: (error) => whole(error.count) },
  { id: "status", text: "status", tell: (error) => orNone(error.status) },
  { id: "kind", text: "kind", style: "code", tell: (error) => orNone(error.kind) },
  { id: "target", text: "target", style: "wide", tell: (error) => orNone([error.service, error.model].filter(Boolean).join(" / ")) },
  { id: "backend", text: "backend", tell: (error) => orNone(error.backend) },
  { id: "key", text: "key", tell: (error) => orNone(error.key) },
  { id: "why", text: "why", style: "wide", tell: (error) => orNone(error.why) },
  { id: "request", text: "requestId", style: "code wide", tell: (error) => orNone(error.request_id) },
];
const KEY_COLUMNS = [
  { id: "name", text: "name", style: "wide", tell: (used) => used.name || used.id },
  { id: "id", text: "id", style: "code wide", tell: (used) => used.id },
  { id: "requests", text: "requestCount", style: "number", tell: (used) => whole(used.requests) },
  { id: "input", text: "tokensInput", style: "number", tell: (used) => whole(used.tokens_input) },
  { id: "output", text: "tokensOutput", style: "number", tell: (used) => whole(used.tokens_output) },
  { id: "cost", text: "cost", style: "number", tell: (used) => used.cost ? used.cost + " " + (used.currency || "") : say("none") },
];

function showRows(place, entries, columns, items, keyOf) {
  if (!place.firstChild) place.append(tableOf(columns).table);
  const update = ({ cells }, item) => {
    for (const column of columns) {
      const cell = cells[column.id];
      if (column.tell) setText(cell, column.tell(item));
      else showTime(cell.firstChild || cell.appendChild(element("time")), column.at(item));
    }
  };
  const rows = syncEntries(entries, items, keyOf, () => rowOf(columns), update);
  arrange(place.querySelector("tbody"), rows.map((row) => row.node));
  place.hidden = rows.length === 0;
}

function showErrors() {
  const newest = [...view.errors].sort((one, other) => Date.parse(other.at) - Date.parse(one.at)).slice(0, 50);
  showRows(byId("error-table"), errorRows, ERROR_COLUMNS, newest, (error) => JSON.stringify([error.since, error.service, error.model, error.backend, error.kind]));
  byId("no-errors").hidden = newest.length > 0;
}

function showKeys() {
  showRows(byId("key-table"), keyRows, KEY_COLUMNS, view.keys, (used) => used.id + " " + used.currency);
  byId("no-keys").hidden = view.keys.length > 0 && !view.keys_note;
  setText(byId("no-keys"), say(view.keys_note || "noKeys"));
}

function fact(name, value) {
  if (!facts.has(name)) {
    const node = element("dd");
    facts.set(name, node);
    byId("facts").append(element("div", "", element("dt", "", say(name)), node));
  }
  setText(facts.get(name), value);
}

function lastReloadText(last) {
  if (!last) return say("never");
  if (last.status === "failed") return say("reloadFailed", { age: ageOf(last.at) });
  return say("reloadOk", { age: ageOf(last.at), models: last.models ?? 0, backends: last.backends ?? 0 });
}

function showConfiguration() {
  const { configuration } = view;
  const last = configuration.last_reload;
  const problems = last && last.status === "failed" ? last.problems || [] : [];
  fact("generation", String(configuration.generation));
  fact("since", dateAndTime(configuration.since));
  fact("started", dateAndTime(view.started));
  fact("lastReload", lastReloadText(last));
  fact("reloadsFailed", whole(configuration.reloads_failed));
  fillList(byId("reload-problems"), problems);
  byId("reload-problems").hidden = problems.length === 0;
  byId("reload").hidden = !view.can_change;
  setText(byId("why-not"), view.can_change ? "" : say("cannotChange", { why: say(view.why_not) }));
  byId("use-key").hidden = view.can_change || key !== "";
}

function fillList(list, texts) {
  const told = JSON.stringify(texts);
  if (list.told === told) return;
  list.told = told;
  list.replaceChildren(...texts.map((text) => element("li", "", text)));
}
