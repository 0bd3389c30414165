/* The way to the gateway: live, else asking again and again; with a key where one is needed. */
function render() {
  byId("content").hidden = view === null;
  byId("forget").hidden = key === "";
  if (view === null) return;
  setText(byId("version"), view.version);
  showProblems();
  showTiles();
  showPlots();
  showPools();
  showErrors();
  showKeys();
  showConfiguration();
}

/* As the gateway has it: a name may have been pointed at it by anybody. */
const isAddress = (host) => host === "localhost" || /^[\d.]+$/.test(host) || host.startsWith("[");

/* The history comes along only when there is more of it. */
function accept(newView) {
  newView.history ??= view?.history;
  if (newView.can_change && newView.needs_address && !isAddress(location.hostname)) {
    Object.assign(newView, { can_change: false, why_not: "by_name" });
  }
  view = newView;
  receivedAt = Date.now();
  link.intervalMs = view.interval_ms || 2000;
  byId("key-form").hidden = true;
  render();
  tellFreshness();
}

function tellFreshness() {
  const age = view ? ago(Date.now() - receivedAt) : "";
  const late = view && Date.now() - receivedAt > 3 * link.intervalMs;
  const [before, word, after] = {
    connecting: ["", say("connecting"), ""],
    live: ["", say("live"), late ? say("liveLate", { age }) : ""],
    polling: view ? [say("pollingBefore", { age }), say("polling"), ""] : ["", say("connecting"), ""],
    none: ["", say("noConnection"), view ? say("noConnectionAge", { age }) : say("noConnectionFirst")],
    refused: ["", say("needsKey"), ""],
  }[link.mode];
  setText(byId("fresh-before"), before);
  setText(byId("fresh-word"), word);
  setText(byId("fresh-after"), after);
  byId("fresh").className = link.mode;
}

function tellAges() {
  tellFreshness();
  if (!view) return;
  for (const node of document.querySelectorAll("time")) {
    const at = node.getAttribute("datetime");
    if (at) setText(node, ageOf(at));
  }
}

const withKey = (headers = {}) => key ? { ...headers, Authorization: "Bearer " + key } : headers;
const isRefusal = (answer) => answer.status === 401 || answer.status === 403;

function stopPolling() {
  clearTimeout(link.pollTimer);
  if (link.poll) link.poll.abort();
  link.poll = null;
}

function disconnect() {
  clearTimeout(link.retryTimer);
  stopPolling();
  if (link.stream) link.stream.abort();
  link.stream = null;
}

function connect() {
  disconnect();
  if (document.hidden) return;
  readStream();
}

/* EventSource cannot send an Authorization header, so the events are read by hand. */
async function readStream() {
  const control = new AbortController();
  let watchdog = 0;
  const heard = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => control.abort(), 3 * link.intervalMs + 5000);
  };
  link.stream = control;
  heard();
  try {
    const answer = await fetch(VIEW_URL + "/live", { headers: withKey({ Accept: "text/event-stream" }), cache: "no-store", signal: control.signal });
    if (isRefusal(answer) && link.stream === control) return askForKey(answer.status);
    if (!answer.ok) throw new Error("HTTP " + answer.status);
    for await (const data of eventsOf(answer.body.getReader(), heard)) {
      if (link.stream !== control) return;
      stopPolling();
      link.mode = "live";
      accept(JSON.parse(data));
    }
  } catch {
    /* Whatever ended the stream: polling takes over. */
  } finally {
    clearTimeout(watchdog);
    control.abort();
    if (link.stream === control) fallBack();
  }
}

async function* eventsOf(reader, heard) {
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    heard();
    const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      if (line !== "" || data.length === 0) continue;
      yield data.join("\n");
      data = [];
    }
  }
}

function fallBack() {
  link.stream = null;
  if (link.mode !== "none") link.mode = "polling";
  clearTimeout(link.retryTimer);
  link.retryTimer = setTimeout(readStream, RETRY_STREAM_MS);
  stopPolling();
  poll();
}

async function poll() {
  const control = new AbortController();
  const limit = setTimeout(() => control.abort(), POLL_MS);
  link.poll = control;
  try {
    const answer = await fetch(VIEW_URL, { headers: withKey(), cache: "no-store", signal: control.signal });
    if (link.poll !== control) return;
    if (isRefusal(answer)) return askForKey(answer.status);
    if (!answer.ok) throw new Error("HTTP " + answer.status);
    const newView = await answer.json();
    if (link.poll !== control) return;
    link.mode = "polling";
    accept(newView);
  } catch {
    if (link.poll === control) link.mode = "none";
  } finally {
    clearTimeout(limit);
    if (link.poll === control) link.pollTimer = setTimeout(poll, POLL_MS);
    tellFreshness();
  }
}

function keepKey(value) {
  key = value;
  remember(() => sessionStorage, "tollgate-key", value);
}

/* A refused key is not kept; data read with another one is not shown on. */
function askForKey(status) {
  disconnect();
  const wasSent = key !== "";
  keepKey("");
  view = null;
  link.mode = "refused";
  document.title = "Tollgate";
  render();
  showKeyForm(wasSent ? say(status === 403 ? "keyNotAdmin" : "keyRefused") : "");
  tellFreshness();
}

function showKeyForm(wrong) {
  byId("key-form").hidden = false;
  setText(byId("key-wrong"), wrong);
  byId("key").focus();
}

function sendKey(event) {
  event.preventDefault();
  const value = byId("key").value.trim();
  byId("key").value = "";
  /* Other characters cannot stand in a header, so no key has them. */
  if (!/^[\x21-\x7e]+$/.test(value)) return showKeyForm(say("keyRefused"));
  keepKey(value);
  setText(byId("key-wrong"), "");
  link.mode = "connecting";
  tellFreshness();
  connect();
}

function forgetKey() {
  keepKey("");
  view = null;
  link.mode = "connecting";
  render();
  tellFreshness();
  connect();
}
