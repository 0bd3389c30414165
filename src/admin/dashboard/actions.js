/* What an operator does from here; theme, language, keyboard. */
let toastTimer = 0;

function tellOutcome(done, failed = "", list = []) {
  clearTimeout(toastTimer);
  const items = list.map((text) => element("li", "", text));
  byId("done").textContent = done;
  byId("failed").replaceChildren(...(failed ? [element("p", "", failed), ...(items.length ? [element("ul", "", ...items)] : [])] : []));
  byId("toast").classList.toggle("shown", done !== "" || failed !== "");
  byId("dismiss").hidden = failed === "";
  if (done) toastTimer = setTimeout(() => tellOutcome(""), 8000);
}

/* Resolves to { ok, status, body }; throws when there was no answer. */
async function post(path) {
  const answer = await fetch(path, { method: "POST", headers: withKey(), cache: "no-store" });
  const body = await answer.json().catch(() => null);
  return { ok: answer.ok, status: answer.status, body };
}

const reasonOf = ({ status, body }) => body?.error?.message || "HTTP " + status;

/* A stream brings the change by itself; a poll is made at once. */
function readSoon() {
  if (link.mode !== "polling" && link.mode !== "none") return;
  stopPolling();
  poll();
}

function changeDrain(row) {
  if (busy.has(backendKey(row.pool, row.backend))) return;
  if (row.backend.drained) sendDrain(row, "undrain");
  else confirmDrain(row);
}

function confirmDrain(row) {
  const { pool, backend } = row;
  const others = pool.backends.some((other) => other.id !== backend.id && isAvailable(other));
  setText(byId("confirm-title"), say("drainAsk", { name: backend.name, pool: poolName(pool) }));
  byId("confirm-last").hidden = others || !isAvailable(backend);
  byId("confirm-yes").onclick = () => {
    byId("confirm").close();
    sendDrain(row, "drain");
  };
  byId("confirm").showModal();
}

/* Runs one action at a time per name; tells its outcome. */
async function act(name, path, what, done, showBusy) {
  if (busy.has(name)) return;
  busy.add(name);
  showBusy();
  try {
    const answer = await post(path);
    if (answer.ok) tellOutcome(done);
    else if (answer.body?.problems) tellOutcome("", say("reloadRefused"), answer.body.problems);
    else tellOutcome("", say("actionFailed", { what, why: reasonOf(answer) }));
  } catch {
    tellOutcome("", say("actionFailed", { what, why: say("noAnswer") }));
  }
  busy.delete(name);
  showBusy();
  readSoon();
}

function sendDrain(row, action) {
  const { pool, backend } = row;
  const values = { name: backend.name, pool: poolName(pool) };
  const query = Object.entries({ service: pool.service, model: pool.model, backend: backend.id })
    .map(([field, value]) => field + "=" + encodeURIComponent(value)).join("&");
  act(backendKey(pool, backend), "/admin/" + action + "?" + query, say(action + "This", values),
    say(action === "drain" ? "isDrained" : "isUndrained", values), () => view && updateAction(row, row.backend, row.pool));
}

function reloadConfiguration() {
  if (!busy.has("reload")) tellOutcome(say("reloading"));
  act("reload", "/admin/reload", say("reload"), say("reloaded"),
    () => setAttribute(byId("reload"), "aria-disabled", String(busy.has("reload"))));
}

function showTheme() {
  document.documentElement.dataset.theme = theme;
  setText(byId("theme"), say("theme", { name: say(theme) }));
}

function nextTheme() {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  remember(() => localStorage, "tollgate-theme", theme);
  showTheme();
}

function fillSelect(select, names, textOf, chosen) {
  select.replaceChildren(...names.map((name) => new Option(textOf(name), name)));
  select.value = chosen;
}

/* Made again in the other language: every row carries words. */
function showLanguage() {
  document.documentElement.lang = locale();
  for (const node of document.querySelectorAll("[data-text]")) setText(node, say(node.dataset.text));
  setAttribute(document.querySelector("nav"), "aria-label", say("navigation"));
  setText(byId("language"), say("otherLanguage"));
  byId("language").lang = language === "zh" ? "en" : "zh-CN";
  byId("filter").placeholder = say("filterHint");
  fillSelect(byId("state"), Object.keys(STATES), say, byId("state").value || "all");
  const sortText = (name) => say(COLUMNS.find((column) => column.sort === name).text);
  fillSelect(byId("sort"), Object.keys(SORTS), sortText, sorting.by);
  for (const cache of [pools, errorRows, keyRows, tiles, facts]) cache.clear();
  for (const id of ["pools", "error-table", "key-table", "tiles", "facts"]) byId(id).replaceChildren();
  plots = [];
  showTheme();
  render();
  tellFreshness();
}

function otherLanguage() {
  language = language === "zh" ? "en" : "zh";
  remember(() => localStorage, "tollgate-language", language);
  showLanguage();
}

function focusFilter(event) {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea") || byId("confirm").open || !view) return;
  event.preventDefault();
  byId("filter").focus();
  byId("filter").select();
}

function start() {
  if (!THEMES.includes(theme)) theme = "auto";
  if (!TEXT[language]) language = /^zh\b/i.test(navigator.language) ? "zh" : "en";
  byId("theme").addEventListener("click", nextTheme);
  byId("language").addEventListener("click", otherLanguage);
  byId("forget").addEventListener("click", forgetKey);
  byId("key-form").addEventListener("submit", sendKey);
  byId("use-key").addEventListener("click", () => showKeyForm(""));
  byId("filter").addEventListener("input", () => showPools(true));
  byId("state").addEventListener("change", () => showPools(true));
  byId("sort").addEventListener("change", () => sortBy(byId("sort").value));
  byId("reload").addEventListener("click", reloadConfiguration);
  byId("confirm-no").addEventListener("click", () => byId("confirm").close());
  byId("dismiss").addEventListener("click", () => tellOutcome(""));
  document.addEventListener("keydown", focusFilter);
  document.addEventListener("visibilitychange", () => document.hidden ? disconnect() : link.mode !== "refused" && connect());
  showLanguage();
  connect();
  setInterval(tellAges, 1000);
}

start();
