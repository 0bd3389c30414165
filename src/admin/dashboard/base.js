/* The state of the page, and what every part of it uses. */
const VIEW_URL = "/api/dashboard";
const POLL_MS = 5000;
const RETRY_STREAM_MS = 30000;
const THEMES = ["auto", "light", "dark"];
const byId = (id) => document.getElementById(id);

let view = null;
let receivedAt = 0;
let key = recall(() => sessionStorage, "tollgate-key") || "";
let theme = recall(() => localStorage, "tollgate-theme");
let language = recall(() => localStorage, "tollgate-language");
const link = { mode: "connecting", stream: null, poll: null, pollTimer: 0, retryTimer: 0, intervalMs: 2000 };
const sorting = { by: "name", down: false };
const busy = new Set();
const pools = new Map();
const errorRows = new Map();
const keyRows = new Map();
let plots = [];
const tiles = new Map();
const facts = new Map();

/* Storage throws where a browser forbids it. */
function recall(storage, name) {
  try { return storage().getItem(name); } catch { return null; }
}

function remember(storage, name, value) {
  try {
    if (value) storage().setItem(name, value); else storage().removeItem(name);
  } catch { /* The choice then lasts until the page is left. */ }
}

function say(name, values = {}) {
  let text = TEXT[language][name];
  if (Array.isArray(text)) text = text[values.n === 1 ? 0 : 1];
  return text.replace(/\{(\w+)\}/g, (_, hole) => typeof values[hole] === "number" ? whole(values[hole]) : values[hole]);
}

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function drawing(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/* Writing only what changed keeps selections and spares screen readers. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

const locale = () => language === "zh" ? "zh-CN" : "en";

/* Making a formatter is slow, so each is made once. */
const formatters = new Map();
function formatter(Kind, options) {
  const name = Kind.name + locale() + JSON.stringify(options);
  if (!formatters.has(name)) formatters.set(name, new Kind(locale(), options));
  return formatters.get(name);
}

const whole = (value) => formatter(Intl.NumberFormat, {}).format(value);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function amount(value) {
  if (!isNumber(value)) return say("none");
  const wide = Math.abs(value) >= 10000;
  return formatter(Intl.NumberFormat, wide ? { notation: "compact", maximumSignificantDigits: 3 }
    : { maximumFractionDigits: value < 10 ? 2 : value < 100 ? 1 : 0 }).format(value);
}

function duration(value) {
  if (!isNumber(value)) return say("none");
  if (value >= 1000) return (value / 1000).toFixed(value < 10000 ? 2 : 1) + " s";
  return value.toFixed(value < 100 ? 1 : 0) + " ms";
}

function percent(fraction) {
  if (!isNumber(fraction)) return say("none");
  const value = 100 * fraction;
  return say("percent", { n: Number.isInteger(value) ? String(value) : value.toFixed(1) });
}

function ago(milliseconds) {
  const seconds = Math.max(0, Math.round(milliseconds / 1000));
  if (seconds < 120) return say("secondsAgo", { n: seconds });
  if (seconds < 7200) return say("minutesAgo", { n: Math.round(seconds / 60) });
  if (seconds < 172800) return say("hoursAgo", { n: Math.round(seconds / 3600) });
  return say("daysAgo", { n: Math.round(seconds / 86400) });
}

/* Ages are told by the server's clock, so a browser's wrong clock does no harm. */
const serverNow = () => Date.parse(view.now) + Date.now() - receivedAt;
const ageOf = (at) => ago(serverNow() - Date.parse(at));

function clock(time, options = { hour: "2-digit", minute: "2-digit" }) {
  return formatter(Intl.DateTimeFormat, { ...options, hourCycle: "h23" }).format(time);
}

const dateAndTime = (at) => clock(Date.parse(at), { dateStyle: "medium", timeStyle: "medium" });

/* Brings the nodes into the given order, moving as few as possible, without losing the focus. */
function arrange(parent, nodes) {
  const focused = document.activeElement;
  let place = parent.firstChild;
  for (const node of nodes) {
    if (node === place) place = place.nextSibling;
    else parent.insertBefore(node, place);
  }
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
}

/* Keeps one entry with a node per item: makes, updates and removes. */
function syncEntries(entries, items, keyOf, make, update) {
  const seen = new Set();
  const list = items.map((item) => {
    let name = keyOf(item);
    while (seen.has(name)) name += "+";
    seen.add(name);
    if (!entries.has(name)) entries.set(name, make(item));
    const entry = entries.get(name);
    update(entry, item);
    return entry;
  });
  for (const [name, entry] of entries) {
    if (seen.has(name)) continue;
    entry.node.remove();
    entries.delete(name);
  }
  return list;
}
