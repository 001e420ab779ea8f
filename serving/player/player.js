// The player page: choose a first frame, press keys, watch the world go on.
import { call, callJson, memory } from "./api.js";
import { Link } from "./link.js";
import { measure } from "./meter.js";
import { clearPad, drawing, setUpPad } from "./pad.js";

const $ = (id) => document.getElementById(id);
const REPEAT_AFTER_MS = 300; // a shorter press is one step
const KEYS = "123456789qwertyuiopasdfghjklzxcvbnm";
let models = [], model = null; // served worlds, the chosen one
let prompt = null; // { gallery } or { blob }
let game = null; // the session being played

// -- telling the player -----------------------------------------------------------------------------------------------

function toast(text) {
  $("toast").textContent = text;
  $("toast").classList.add("show");
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => $("toast").classList.remove("show"), 3200);
}

function showState(state, text) {
  $("state").dataset.state = state;
  $("state").textContent = text;
}

// -- choosing the first frame -----------------------------------------------------------------------------------------

const aspect = () => model.width_px / model.height_px;

function chooseModel(reference) {
  model = models.find((m) => m.reference === reference) ?? models[0];
  $("model").value = model.reference;
  for (const canvas of [$("preview"), $("pad")]) {
    canvas.width = model.width_px;
    canvas.height = model.height_px;
  }
  const url = (id) => `/v1/gallery/${encodeURIComponent(model.reference)}/${encodeURIComponent(id)}.png`;
  $("gallery").replaceChildren(...model.gallery.map((id, i) => {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", tabIndex: i ? -1 : 0, onclick: () => pick(button, id, url(id)) });
    button.role = "radio";
    button.ariaChecked = "false";
    button.ariaLabel = `Picture ${i + 1}`;
    const image = document.createElement("img");
    Object.assign(image, { src: url(id), alt: "", width: model.width_px, height: model.height_px });
    button.append(image);
    return button;
  }));
  $("gallery-empty").hidden = model.gallery.length > 0;
  prompt = null;
  $("play").disabled = true;
  clearPad();
  if (model.gallery.length) pick($("gallery").firstChild, model.gallery[0], url(model.gallery[0]));
  else selectTab("draw");
}

async function pick(button, id, url) {
  check($("gallery"), button);
  await usePicture(await (await fetch(url)).blob(), { gallery: id });
}

function check(group, chosen) {
  for (const item of group.children) {
    item.ariaChecked = String(item === chosen);
    item.tabIndex = item === chosen ? 0 : -1;
  }
}

/** Shows a picture as the world will get it: cropped around the centre, resized. */
async function usePicture(blob, choice = { blob }) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    $("launch-error").textContent = "That file is no picture this page can read. Choose a PNG, JPEG or WebP.";
    return;
  }
  const { width, height } = $("preview"), scale = Math.min(bitmap.width / width, bitmap.height / height);
  const context = $("preview").getContext("2d");
  const w = width * scale, h = height * scale;
  context.imageSmoothingEnabled = scale > 1;
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (bitmap.width - w) / 2, (bitmap.height - h) / 2, w, h, 0, 0, width, height);
  prompt = choice;
  if (choice.blob) check($("gallery"), null);
  $("launch-error").textContent = "";
  $("play").disabled = false;
}

function selectTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const on = tab.id === `tab-${name}`;
    tab.ariaSelected = String(on);
    tab.tabIndex = on ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !on;
  }
}

/** Arrow keys move inside a group of tabs or radios. */
function roving(group) {
  group.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    const items = [...group.children], next = items[(items.indexOf(document.activeElement) + by + items.length) % items.length];
    next.focus();
    next.click();
  });
}

// -- starting and resuming --------------------------------------------------------------------------------------------

async function launch(event) {
  event.preventDefault();
  const form = new FormData();
  if (prompt.gallery) form.set("gallery", prompt.gallery);
  else form.set("picture", prompt.blob, "prompt");
  form.set("model", model.reference);
  form.set("seed", $("seed").value.trim());
  $("play").disabled = true;
  $("launch-error").textContent = "";
  showState("resuming", "lighting up");
  try {
    open(await callJson("/v1/sessions", { method: "POST", body: form, token: $("key").value }));
  } catch (error) {
    $("launch-error").textContent = error.message;
    showState("idle", "ready");
  }
  $("play").disabled = false;
}

const tokens = () => memory.read("sessions", []);

function keep(session, thumb) {
  const rest = tokens().filter((s) => s.session !== session.session), old = tokens().find((s) => s.session === session.session);
  const { token, model, step } = session;
  memory.write("sessions", [{ session: session.session, token, model, step, thumb: thumb ?? old?.thumb }, ...rest].slice(0, 12));
}

function showRecent() {
  $("recent").hidden = !tokens().length;
  $("recent-list").replaceChildren(...tokens().map((s) => {
    const button = document.createElement("button"), text = document.createElement("span");
    button.type = "button";
    if (s.thumb) button.append(Object.assign(document.createElement("img"), { src: s.thumb, alt: "" }));
    text.textContent = `${s.model} · step ${s.step}`;
    button.append(text);
    button.onclick = () => resume(s.session, s.token);
    return button;
  }));
}

async function resume(session, token) {
  try {
    open({ ...(await callJson(`/v1/sessions/${session}`, { token })), token });
  } catch (error) {
    if (error.status === 404 || error.status === 401) memory.write("sessions", tokens().filter((s) => s.session !== session));
    showRecent();
    history.replaceState(null, "", "/");
    $("launch-error").textContent = error.message;
  }
}

/** Links carry the token behind the #, which no server ever sees; it moves to this browser's memory at once. */
function readLink() {
  const link = new URLSearchParams(location.hash.slice(1)), session = link.get("session");
  if (!session) return;
  const token = link.get("token") ?? tokens().find((s) => s.session === session)?.token;
  history.replaceState(null, "", `/#session=${session}`);
  resume(session, token);
}

// -- playing ----------------------------------------------------------------------------------------------------------

function open(session) {
  game?.link.close();
  keep(session);
  const link = new Link(session.session, session.token, { onFrame: show, onState: state });
  game = { ...session, link, held: null, run: false, last: 0, looking: null, times: [], frames: [], drawn: 0, tickets: 0, painted: 0, sentAt: 0 };
  history.replaceState(null, "", `/#session=${session.session}`);
  $("start").hidden = true;
  $("game").hidden = false;
  $("veil").hidden = $("past").hidden = true;
  for (const canvas of [$("canvas"), $("glow")]) Object.assign(canvas, { width: session.width_px, height: session.height_px });
  delete $("canvas").dataset.step; // resized, so empty until the greeting is drawn
  $("screen").style.setProperty("--aspect", session.width_px / session.height_px);
  Object.assign($("scrub"), { min: session.first, max: session.step, value: session.step });
  $("fact-model").textContent = session.model;
  $("fact-seed").textContent = session.seed;
  $("fact-session").textContent = session.session.slice(0, 8);
  $("run").ariaPressed = "false";
  drawActions();
  measure(game);
  link.connect();
  $("canvas").focus();
}

function drawActions() {
  const labels = memory.read(`labels.${game.model}`, {});
  $("pad-actions").replaceChildren(...Array.from({ length: game.actions }, (_, action) => {
    const button = document.createElement("button"), key = document.createElement("b"), label = document.createElement("span");
    Object.assign(button, { type: "button", title: "Right click or long press to name it" });
    button.dataset.action = action;
    key.textContent = (KEYS[action] ?? String(action + 1)).toUpperCase();
    label.textContent = labels[action] ?? `action ${action + 1}`;
    button.append(key, label);
    button.onpointerdown = (event) => event.button === 0 && hold(action);
    button.onpointerup = button.onpointerleave = button.onpointercancel = () => let_go(action);
    button.onclick = (event) => { if (event.detail === 0) { hold(action); let_go(action); } };
    button.oncontextmenu = (event) => {
      event.preventDefault();
      let_go(action);
      const name = window.prompt(`What does action ${action + 1} do?`, labels[action] ?? "");
      if (name === null) return;
      memory.write(`labels.${game.model}`, { ...labels, [action]: name.trim().slice(0, 24) || undefined });
      drawActions();
    };
    return button;
  }));
}

function hold(action) {
  game.held = game.last = action;
  game.tapped = true;
  game.heldAt = performance.now();
  now();
  for (const b of $("pad-actions").children) b.toggleAttribute("data-down", Number(b.dataset.action) === action);
  pump();
}

function let_go(action) {
  if (game?.held !== action) return;
  game.held = null;
  for (const b of $("pad-actions").children) b.removeAttribute("data-down");
}

/** Sends the next action when one is due: a tap once, a held key again and again at the chosen pace. */
function pump() {
  clearTimeout(game.timer);
  const wanted = game.held ?? (game.run || game.tapped ? game.last : null);
  if (wanted === null || (!game.link.free && !game.link.asleep)) return;
  const pace = Number($("pace").value), since = performance.now() - game.sentAt;
  const due = Math.max(pace ? 1000 / (game.fps * pace) : 0, game.run ? 0 : game.heldAt + REPEAT_AFTER_MS - game.sentAt);
  if (!game.tapped && due - since > 1) {
    game.timer = setTimeout(pump, due - since);
    return;
  }
  if (game.link.act(wanted)) {
    game.sentAt = performance.now();
    game.tapped = false;
  }
}

async function show(frame) {
  if (frame.roundTrip !== null) game.times.push(frame);
  game.frames.push(performance.now());
  game.step = game.link.step;
  $("scrub").max = game.step;
  if (game.looking === null) {
    await draw(frame.blob, frame.step);
    keep(game, frame.step % 10 === 1 || frame.step === game.start ? $("canvas").toDataURL("image/jpeg", 0.7) : undefined);
  }
  measure(game);
  pump();
}

async function draw(blob, step) {
  const here = game, ticket = ++here.tickets;
  const bitmap = await createImageBitmap(blob);
  if (game !== here || ticket < here.painted) return; // left, or a later picture was ready first
  here.painted = ticket;
  for (const canvas of [$("canvas"), $("glow")]) canvas.getContext("2d").drawImage(bitmap, 0, 0);
  game.drawn += 1;
  $("canvas").dataset.step = step;
  $("canvas").dataset.drawn = game.drawn;
  $("canvas").ariaLabel = `The world at step ${step}. Keys 1 to ${game.actions} act.`;
  $("step").textContent = step;
  $("scrub").value = step;
}

function state(name, text, reason, code) {
  showState(name, text);
  if (name === "live") {
    $("veil").hidden = true;
    pump();
  }
  if (name !== "stopped") return;
  $("veil").hidden = false;
  $("veil-text").textContent = reason || "The session has ended.";
  const again = code === 4410;
  $("veil-button").textContent = again ? "Play here" : "New world";
  $("veil-button").onclick = () => (again ? (game.link.connect(), ($("veil").hidden = true)) : leave());
}

function leave() {
  game?.link.close();
  game = null;
  history.replaceState(null, "", "/");
  $("game").hidden = true;
  $("start").hidden = false;
  showState("idle", "ready");
  showRecent();
}

// -- the past ---------------------------------------------------------------------------------------------------------

async function look(step) {
  if (step >= game.link.step) return now(true);
  const here = game;
  game.looking = step;
  game.run = false;
  $("run").ariaPressed = "false";
  $("past").hidden = false;
  $("past-step").textContent = `step ${step}`;
  const frame = await call(`/v1/sessions/${game.session}/frames/${step}.jpg`, { token: game.token });
  const blob = await frame.blob();
  if (game === here && game.looking === step) await draw(blob, step);
}

async function now(redraw = false) {
  if (game.looking === null && !redraw) return;
  game.looking = null;
  $("past").hidden = true;
  const step = game.link.step;
  const frame = await call(`/v1/sessions/${game.session}/frames/${step}.jpg`, { token: game.token });
  const blob = await frame.blob();
  if (game.looking === null && game.link.step === step) await draw(blob, step);
}

async function fork() {
  const step = Math.max(game.start, game.looking ?? game.link.step);
  const made = await callJson(`/v1/sessions/${game.session}/fork`, { method: "POST", token: game.token, json: { step } });
  keep(game);
  open(made.sessions[0]);
  toast(`Forked at step ${step}. The old session is kept.`);
}

async function save() {
  toast("Making the video…");
  const answer = await call(`/v1/sessions/${game.session}/export.mp4`, { token: game.token });
  const url = URL.createObjectURL(await answer.blob());
  Object.assign(document.createElement("a"), { href: url, download: `lampworks-${game.session}.mp4` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

async function share() {
  const link = `${location.origin}/#session=${game.session}&token=${game.token}`;
  try {
    await navigator.clipboard.writeText(link);
    toast("Link copied. Who has it can play this session.");
  } catch {
    window.prompt("Who has this link can play this session:", link);
  }
}

async function checkReplay() {
  toast("Computing the session again…");
  const found = await callJson(`/v1/sessions/${game.session}/replay`, { method: "POST", token: game.token });
  toast(found.equal ? `All ${found.steps} steps came out the same, token by token.` : `Step ${found.differs_at} differs.`);
}

// -- keys, buttons, pads ----------------------------------------------------------------------------------------------

const running = (on) => {
  game.run = on;
  $("run").ariaPressed = String(on);
  pump();
};
const singleStep = () => {
  game.tapped = true;
  now();
  pump();
};
const KEYMAP = {
  " ": () => running(!game.run), ".": singleStep, f: () => fork().catch(oops), Escape: () => now().catch(oops),
  ArrowLeft: () => look(Math.max(game.first, (game.looking ?? game.link.step) - 1)).catch(oops),
  ArrowRight: () => game.looking !== null && look(game.looking + 1).catch(oops),
};
const oops = (error) => toast(error.message);

function keyDown(event) {
  if (!game || $("help").open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("select, input") || (event.target.matches("button") && event.key === " ")) return;
  const action = KEYS.slice(0, game.actions).indexOf(event.key.toLowerCase());
  if (action >= 0) {
    event.preventDefault();
    if (!event.repeat) hold(action);
  } else if (KEYMAP[event.key] && !(event.repeat && !event.key.startsWith("Arrow"))) {
    event.preventDefault();
    KEYMAP[event.key]();
  }
}

function readGamepads() {
  const pressed = [...navigator.getGamepads()].flatMap((p) => (p ? p.buttons.map((b, i) => (b.pressed ? i : -1)) : []));
  const action = pressed.find((i) => i >= 0 && i < (game?.actions ?? 0));
  if (game && action !== game.padHeld) {
    if (game.padHeld !== undefined) let_go(game.padHeld);
    if (action !== undefined) hold(action);
    game.padHeld = action;
  }
  requestAnimationFrame(readGamepads);
}

function setUp() {
  setUpPad(check, usePicture);
  for (const group of [document.querySelector("[role=tablist]"), $("gallery"), $("palette")]) roving(group);
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.onclick = () => {
      selectTab(tab.id.slice(4));
      if (tab.id === "tab-draw") drawing(usePicture);
    };
  }
  $("file").onchange = () => $("file").files[0] && usePicture($("file").files[0]);
  $("drop").ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
  $("drop").ondragleave = () => $("drop").classList.remove("over");
  $("drop").ondrop = (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    if (event.dataTransfer.files[0]) usePicture(event.dataTransfer.files[0]);
  };
  document.onpaste = (event) => {
    const file = [...event.clipboardData.files].find((f) => f.type.startsWith("image/"));
    if (file && !game) { selectTab("upload"); usePicture(file); }
  };
  $("model").onchange = () => chooseModel($("model").value);
  $("dice").onclick = () => { $("seed").value = Math.floor(Math.random() * 2 ** 32); };
  $("launch").onsubmit = launch;
  $("run").onclick = () => running(!game.run);
  $("single").onclick = singleStep;
  $("scrub").oninput = () => look(Number($("scrub").value)).catch(oops);
  for (const [id, door] of Object.entries({ fork, share, export: save, replay: checkReplay })) $(id).onclick = () => door().catch(oops);
  $("again").onclick = leave;
  $("help-open").onclick = () => $("help").showModal();
  document.onkeydown = keyDown;
  document.onkeyup = (event) => game && let_go(KEYS.indexOf(event.key.toLowerCase()));
  window.onblur = () => game && game.held !== null && let_go(game.held);
  window.addEventListener("gamepadconnected", readGamepads, { once: true });
}

async function main() {
  setUp();
  const served = await callJson("/v1/models");
  models = served.models;
  $("key-field").hidden = !served.key_needed;
  $("model").replaceChildren(...models.map((m) => new Option(m.reference, m.reference)));
  chooseModel(models[0].reference);
  showRecent();
  readLink();
}

main().catch((error) => { $("launch-error").textContent = error.message; showState("stopped", "no server"); });
