// Playing: frames as they come, keys, the past, forks, and what may be done with a session.
import { call, callJson, memory, remember } from "./api.js";
import { Link } from "./link.js";
import { measure } from "./meter.js";
import { $, showState, toast } from "./page.js";

const REPEAT_AFTER_MS = 300; // a shorter press is one step
const KEYS = "123456789qwertyuiopasdfghjklzxcvbnm";
let game = null; // the session being played
let left = () => {}; // called when it is left

export const isPlaying = () => game !== null;

function drop() {
  game?.link.close();
  clearTimeout(game?.timer);
  game = null;
  delete $("canvas").dataset.step; // what it shows belongs to no session now
}

export function open(session) {
  drop();
  remember(session);
  const link = new Link(session.session, session.token, { onFrame: show, onState: state });
  game = { ...session, link, held: null, run: false, last: 0, looking: null, times: [], frames: [], drawn: 0, tickets: 0, painted: 0, sentAt: 0 };
  history.replaceState(null, "", `/#session=${session.session}`);
  $("start").hidden = true;
  $("game").hidden = false;
  $("veil").hidden = $("past").hidden = true;
  for (const canvas of [$("canvas"), $("glow")]) Object.assign(canvas, { width: session.width_px, height: session.height_px });
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
    label.classList.toggle("unnamed", !labels[action]);
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
  const here = game;
  if (frame.roundTrip !== null) game.times.push(frame);
  game.frames.push(performance.now());
  game.step = game.link.step;
  $("scrub").max = game.step;
  if (game.looking === null) {
    await draw(frame.blob, frame.step);
    if (game === here) remember(game, frame.step % 10 === 1 || frame.step === game.start ? $("canvas").toDataURL("image/jpeg", 0.7) : undefined);
  }
  if (game !== here) return; // left meanwhile
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
  if (name === "queued") {
    $("veil").hidden = false;
    $("veil-text").textContent = `All places are taken. You are ${text}; play begins by itself.`;
    $("veil-button").textContent = "Do not wait";
    $("veil-button").onclick = leave;
  }
  if (name !== "stopped") return;
  $("veil").hidden = false;
  $("veil-text").textContent = reason || "The session has ended.";
  const again = code === 4410;
  $("veil-button").textContent = again ? "Play here" : "New world";
  $("veil-button").onclick = () => (again ? (game.link.connect(), ($("veil").hidden = true)) : leave());
}

function leave() {
  drop();
  history.replaceState(null, "", "/");
  $("game").hidden = true;
  $("start").hidden = false;
  showState("idle", "ready");
  left();
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
  const here = game, step = game.link.step;
  const frame = await call(`/v1/sessions/${game.session}/frames/${step}.jpg`, { token: game.token });
  const blob = await frame.blob();
  if (game === here && game.looking === null && game.link.step === step) await draw(blob, step);
}

async function fork() {
  const step = Math.max(game.start, game.looking ?? game.link.step);
  const made = await callJson(`/v1/sessions/${game.session}/fork`, { method: "POST", token: game.token, json: { step } });
  remember(game);
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

/** `onLeave` is called when the player goes back to the start. */
export function setUpGame(onLeave) {
  left = onLeave;
  $("run").onclick = () => running(!game.run);
  $("single").onclick = singleStep;
  $("scrub").oninput = () => look(Number($("scrub").value)).catch(oops);
  for (const [id, door] of Object.entries({ fork, share, export: save, replay: checkReplay })) $(id).onclick = () => door().catch(oops);
  $("again").onclick = leave;
  document.onkeydown = keyDown;
  document.onkeyup = (event) => game && let_go(KEYS.indexOf(event.key.toLowerCase()));
  window.onblur = () => game && game.held !== null && let_go(game.held);
  window.addEventListener("gamepadconnected", readGamepads, { once: true });
}
