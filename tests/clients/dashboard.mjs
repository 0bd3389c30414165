// Drives the dashboard of a running gateway in a real browser.
//
// node dashboard.mjs SCENE PAGE_URL CONTROL_URL CONFIGURATION_FILE SHOTS_FOLDER
//
// CONTROL_URL is of an upstream whose health its path decides: POST CONTROL_URL/down, /up. Ends with "all fine".

import assert from "node:assert/strict";
import fs from "node:fs";
import { createRequire } from "node:module";

const { chromium } = createRequire(new URL("../../.node/", import.meta.url))("playwright-core");
const [scene, url, control, configuration, shots] = process.argv.slice(2);

const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});

async function open({ key, ...options } = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, locale: "en-US", ...options });
  const page = await context.newPage();
  page.faults = [];
  page.on("console", (message) => {
    // To a browser any refusal is a failure: of a key, of a configuration, for want of room.
    const isRefusal = /status of (401|403|422|503)/.test(message.text());
    if (message.type() === "error" && !isRefusal) page.faults.push(message.text());
  });
  page.on("pageerror", (error) => page.faults.push(String(error.stack)));
  await page.goto(url);
  if (key) {
    await page.fill("#key", key);
    await page.keyboard.press("Enter");
  }
  return page;
}

const shown = (page) => page.waitForSelector("#content:not([hidden])");
const textOf = (page, id, text) =>
  page.waitForFunction(([id, text]) => document.getElementById(id).textContent === text, [id, text]);

/* Nothing wider than the page, nothing that the browser complains of. */
async function look(page, name, fullPage = true) {
  const wider = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  assert.ok(wider <= 0, `${name} is ${wider} px too wide`);
  await page.screenshot({ path: `${shots}/${name}.png`, fullPage });
  assert.deepEqual(page.faults, [], name);
}

/* Texts with less contrast than WCAG's AA asks for, against the nearest background. */
const faint = (page) => page.evaluate(() => {
  const rgb = (color) => (color.match(/[\d.]+/g) || []).map(Number);
  const part = (value) => (value /= 255) <= .03928 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * part(r) + .7152 * part(g) + .0722 * part(b);
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const owner = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !owner.checkVisibility()) continue;
    if (["SCRIPT", "STYLE", "OPTION"].includes(owner.tagName)) continue;
    let behind = [255, 255, 255];
    for (let node = owner; node; node = node.parentElement) {
      const color = rgb(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) { behind = color; break; }
    }
    const [a, b] = [light(rgb(getComputedStyle(owner).color)), light(behind)].sort((one, other) => other - one);
    if ((a + .05) / (b + .05) < 4.5) found.push(owner.className || owner.tagName);
  }
  return found;
});

/* Reloading would lose this mark. */
const mark = (page) => page.evaluate(() => { window.mark = 1; });
const isMarked = (page) => page.evaluate(() => window.mark === 1);

const rows = (page) => page.evaluate(() =>
  [...document.querySelectorAll(".pool:not([hidden]) tbody tr:not([hidden])")].map((row) =>
    `${row.closest(".pool").querySelector("h2").firstChild.data} ${row.querySelector(".c-name").textContent}`));

/* Three backends; the page needs a key. */
async function few() {
  const page = await open();
  await page.waitForSelector("#key-form:not([hidden])");
  assert.equal(await page.evaluate(() => document.activeElement.id), "key");
  for (const [key, words] of [["sk-nobody", "The key was not accepted."], ["sk-user", "The key is known, but it is not an admin's."]]) {
    await page.fill("#key", key);
    await page.keyboard.press("Enter");
    await textOf(page, "key-wrong", words);
  }
  await look(page, "key", false);
  await page.fill("#key", "sk-admin");
  await page.keyboard.press("Enter");
  await shown(page);
  await textOf(page, "fresh", "Live");
  await page.waitForFunction(() => document.title === "Tollgate");
  assert.equal(await page.textContent("#problems"), "All backends are available");
  assert.ok(await page.evaluate(() => !Object.values(localStorage).includes("sk-admin")));
  await page.waitForFunction(() => document.getElementById("key-table").textContent.includes("user"));
  await page.waitForFunction(() => document.getElementById("error-table").textContent.includes("upstream_5xx"));
  await page.waitForFunction(() => !document.getElementById("tiles").textContent.includes("Requests per second0"));
  assert.deepEqual(await faint(page), []);
  await look(page, "few-light");

  // A backend goes down and comes back, and the page tells without being asked to.
  await mark(page);
  await fetch(control + "/down", { method: "POST" });
  await page.waitForFunction(() => document.title === "1 down – Tollgate");
  assert.match(await page.textContent("#problems"), /1 backend is down: Node 1 \(svc \/ mdl\): GET \/state answered 503, expected 200/);
  assert.deepEqual(await faint(page), []);
  await look(page, "few-down");
  await fetch(control + "/up", { method: "POST" });
  await page.waitForFunction(() => document.title === "Tollgate");
  assert.ok(await isMarked(page), "the page was loaded again");

  // Drained by keyboard alone, and back.
  const drain = page.getByRole("button", { name: "Drain Node 1 of svc / mdl" });
  await drain.focus();
  await page.keyboard.press("Enter");
  assert.equal(await page.evaluate(() => document.activeElement.id), "confirm-no");
  await page.keyboard.press("Escape");
  assert.match(await page.evaluate(() => document.activeElement.getAttribute("aria-label")), /^Drain Node 1/);
  for (const pressed of ["Enter", "Tab", "Enter"]) await page.keyboard.press(pressed);
  await textOf(page, "done", "Node 1 of svc / mdl is drained.");
  const back = page.getByRole("button", { name: "Undrain Node 1 of svc / mdl" });
  await back.waitFor();
  await look(page, "few-drained", false);
  await back.click();
  await drain.waitFor();

  // A reload that works, and one that does not.
  await page.click("#reload");
  await textOf(page, "done", "The configuration is reloaded.");
  const good = fs.readFileSync(configuration);
  fs.appendFileSync(configuration, "\nnonsense: 1\nmore: 2\n");
  await page.click("#reload");
  await page.waitForFunction(() => document.querySelectorAll("#failed li").length === 2);
  await page.waitForFunction(() => document.querySelectorAll("#reload-problems li").length === 2);
  await look(page, "few-reload-failed");
  fs.writeFileSync(configuration, good);
  await page.click("#dismiss");
  await page.click("#reload");
  await textOf(page, "done", "The configuration is reloaded.");

  // Theme and language stay when the page is loaded again.
  await page.click("#theme");
  await page.click("#theme");
  assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), "dark");
  assert.deepEqual(await faint(page), []);
  await look(page, "few-dark");
  await page.click("#language");
  assert.equal(await page.evaluate(() => document.documentElement.lang), "zh-CN");
  assert.equal(await page.textContent("#backends h2"), "后端");
  await look(page, "few-chinese");
  await page.reload();
  await shown(page);
  assert.deepEqual(await page.evaluate(() => [document.documentElement.lang, document.documentElement.dataset.theme]), ["zh-CN", "dark"]);
  await page.click("#forget");
  await page.waitForSelector("#key-form:not([hidden])");
  assert.equal(await page.isVisible("#content"), false);

  const phone = await open({ key: "sk-admin", viewport: { width: 360, height: 780 }, hasTouch: true, isMobile: true });
  await shown(phone);
  await look(phone, "phone");
  for (const width of [320, 480, 768, 1024]) {
    await phone.setViewportSize({ width, height: 780 });
    await look(phone, `width-${width}`);
  }
}

/* 300 backends in 20 pools. */
async function many() {
  const page = await open();
  await shown(page);
  await textOf(page, "count", "300 of 300 backends");
  await look(page, "many", false);
  await page.keyboard.press("/");
  assert.equal(await page.evaluate(() => document.activeElement.id), "filter");
  await page.keyboard.type("model-7 node-3");
  await page.waitForFunction(() => document.getElementById("count").textContent === "1 of 300 backends");
  assert.deepEqual(await rows(page), ["svc / model-7 node-3 "]);
  await page.fill("#filter", "nothing-like-it");
  assert.ok(await page.isVisible("#no-match"));
  await page.fill("#filter", "");
  await page.selectOption("#state", "problems");
  // One address of each pool has nobody behind it.
  await page.waitForFunction(() => document.getElementById("count").textContent === "20 of 300 backends");
  assert.ok((await rows(page)).every((row) => / node-14 .*refused/.test(row)));
  await page.evaluate(() => document.querySelector(".bar").scrollIntoView());
  await look(page, "many-problems", false);
  await page.selectOption("#state", "all");
  const first = page.locator(".pool").first();
  await first.getByRole("button", { name: "State", exact: true }).click();
  assert.equal(await first.locator("th.c-state").getAttribute("aria-sort"), "descending");
  const worst = () => page.evaluate(() => [...document.querySelectorAll(".pool")].map((pool) => pool.querySelector("tbody tr .c-name span").textContent));
  assert.ok((await worst()).every((name) => name === "node-14"));
  await first.getByRole("button", { name: "Backend", exact: true }).click();
  const names = await page.evaluate(() => [...document.querySelectorAll(".pool:first-child td.c-name span:first-child")].map((name) => name.textContent));
  assert.deepEqual(names.slice(0, 4), ["node-0", "node-1", "node-2", "node-3"]);
  assert.equal(names.at(-1), "node-14");

  // What somebody looks at stays where it is while the page goes on.
  const target = page.getByRole("button", { name: "Drain node-7 of svc / model-12" });
  await target.focus();
  await page.mouse.move(2, 2);
  const before = await page.evaluate(() => {
    window.kept = document.activeElement;
    return { top: window.kept.getBoundingClientRect().top, now: view.now };
  });
  await page.waitForFunction((now) => view.now !== now, before.now);
  const after = await page.evaluate(() => ({ isSame: window.kept === document.activeElement, top: window.kept.getBoundingClientRect().top }));
  assert.ok(after.isSame && Math.abs(after.top - before.top) <= 1, JSON.stringify([before, after]));

  const phone = await open({ viewport: { width: 360, height: 780 }, hasTouch: true, isMobile: true });
  await shown(phone);
  await look(phone, "many-phone", false);

  // The way by keyboard begins with a way past all that.
  await page.reload();
  await shown(page);
  const reached = [];
  for (let count = 0; count < 24; count += 1) {
    await page.keyboard.press("Tab");
    reached.push(await page.evaluate(() => document.activeElement.id || document.activeElement.className || document.activeElement.closest("th")?.className || ""));
  }
  assert.equal(reached[0], "skip");
  for (const id of ["theme", "language", "filter", "state"]) assert.ok(reached.includes(id), `${id}: ${reached}`);
}

/* All live connections are taken, nothing is counted, and nothing can be changed from here. */
async function bare() {
  const page = await open();
  await shown(page);
  await page.waitForFunction(() => /polling$/.test(document.getElementById("fresh").textContent));
  assert.ok(await page.isVisible("#metrics-off"));
  assert.match(await page.textContent("#why-not"), /admin\.listen/);
  assert.equal(await page.locator(".pool button:visible", { hasText: "Drain" }).count(), 0);
  assert.match(await page.textContent("#no-keys"), /Clients need no key/);
  const texts = await page.evaluate(() => {
    const holes = (text) => [...new Set([text].flat().join().match(/\{\w+\}/g) || [])].sort().join();
    const differ = (key) => TEXT.zh[key] === undefined || holes(TEXT.en[key]) !== holes(TEXT.zh[key]);
    return [Object.keys(TEXT.en).length - Object.keys(TEXT.zh).length, Object.keys(TEXT.en).filter(differ)];
  });
  assert.deepEqual(texts, [0, []], "the two languages say the same");
  await mark(page);
  await fetch(control + "/down", { method: "POST" });
  await page.waitForFunction(() => document.title === "1 down – Tollgate");
  assert.ok(await isMarked(page));
  await look(page, "bare");
}

try {
  await { few, many, bare }[scene]();
  console.log("all fine");
} finally {
  await browser.close();
}
