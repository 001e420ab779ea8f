// The start: worlds, the first frame, sessions to go on with.
import { callJson, forget, remembered } from "./api.js";
import { clearPad, drawing, setUpPad } from "./pad.js";
import { $, check, roving, showState } from "./page.js";

const RETRY_AT_MOST_S = 60;
let models = [], model = null; // served worlds, the chosen one
let prompt = null; // { gallery }, { blobs } or { text }
let enter = null, retry = null; // opens a session; a launch that waits for its turn

// -- worlds -----------------------------------------------------------------------------------------------------------

const pictureUrl = (m, id) => `/v1/gallery/${encodeURIComponent(m.reference)}/${encodeURIComponent(id)}.png`;
const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;

function element(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text, ...properties });
}

function showModels() {
  $("models").replaceChildren(...models.map((m, i) => {
    const button = element("button", "", { type: "button", tabIndex: i ? -1 : 0, onclick: () => chooseModel(m.reference) });
    button.role = "radio";
    const facts = [`${m.width_px} × ${m.height_px}`, `${m.fps} frames/s`, count(m.actions, "action"), ...m.aliases];
    const about = element("span", ""), playing = m.players ? `${count(m.players, "player")} now` : "nobody plays";
    about.append(element("b", m.reference), element("span", facts.join(" · ")), element("i", playing));
    if (m.gallery.length) button.append(element("img", "", { src: pictureUrl(m, m.gallery[0]), alt: "" }));
    button.append(about);
    button.dataset.reference = m.reference;
    return button;
  }));
}

function chooseModel(reference) {
  model = models.find((m) => m.reference === reference) ?? models[0];
  check($("models"), [...$("models").children].find((b) => b.dataset.reference === model.reference));
  for (const canvas of [$("preview"), $("pad")]) {
    canvas.width = model.width_px;
    canvas.height = model.height_px;
  }
  $("gallery").replaceChildren(...model.gallery.map((id, i) => {
    const button = element("button", "", { type: "button", tabIndex: i ? -1 : 0, onclick: () => pick(button, id) });
    button.role = "radio";
    button.ariaChecked = "false";
    button.ariaLabel = `Picture ${i + 1}`;
    button.append(element("img", "", { src: pictureUrl(model, id), alt: "", width: model.width_px, height: model.height_px }));
    return button;
  }));
  $("gallery-empty").hidden = model.gallery.length > 0;
  $("title-field").hidden = !model.words;
  prompt = null;
  $("play").disabled = true;
  clearPad();
  if (model.gallery.length) pick($("gallery").firstChild, model.gallery[0]);
  else selectTab("draw");
}

// -- the first frame --------------------------------------------------------------------------------------------------

async function pick(button, id) {
  check($("gallery"), button);
  const blob = await (await fetch(pictureUrl(model, id))).blob();
  await usePicture(blob, { gallery: id });
}

/** Shows a picture as the world will get it: cropped around the centre, resized. */
async function usePicture(blob, choice = { blobs: [blob] }) {
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
  if (!choice.gallery) check($("gallery"), null);
  $("launch-error").textContent = "";
  $("play").disabled = false;
}

/** Several pictures are consecutive frames: what moves between them goes on moving. The last one is shown. */
async function usePictures(files) {
  const blobs = [...files].filter((f) => f.type.startsWith("image/")).slice(-model.prompt_frames);
  if (!blobs.length && files.length) return usePicture(files[0]);
  if (blobs.length) await usePicture(blobs.at(-1), { blobs });
  $("frames").textContent = blobs.length > 1 ? `${blobs.length} frames; play goes on from the last.` : "";
}

function useText() {
  const text = $("text").value.trim();
  prompt = text ? { text } : null;
  check($("gallery"), null);
  $("play").disabled = !text;
}

function selectTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const on = tab.id === `tab-${name}`;
    tab.ariaSelected = String(on);
    tab.tabIndex = on ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !on;
  }
}

// -- starting and resuming --------------------------------------------------------------------------------------------

function requestBody() {
  const form = new FormData();
  if (prompt.gallery) form.set("gallery", prompt.gallery);
  else if (prompt.text) form.set("text", prompt.text);
  else for (const blob of prompt.blobs) form.append("picture", blob, "prompt");
  form.set("model", model.reference);
  form.set("seed", $("seed").value.trim());
  if (model.words) form.set("title", $("title").value.trim());
  return form;
}

async function launch(event) {
  event?.preventDefault();
  calmDown();
  $("play").disabled = true;
  $("launch-error").textContent = "";
  showState("resuming", "lighting up");
  try {
    enter(await callJson("/v1/sessions", { method: "POST", body: requestBody(), token: $("key").value }));
  } catch (error) {
    showState("idle", "ready");
    $("launch-error").textContent = error.message;
    const wait = error.problem?.retry_after_s;
    if ([429, 503].includes(error.status) && wait <= RETRY_AT_MOST_S) waitForTurn(Math.ceil(wait), error.problem.position);
  }
  $("play").disabled = false;
}

/** The server is full: says for how long, and where in line, and asks again by itself. */
function waitForTurn(seconds, position) {
  const place = position ? `number ${position} in line, ` : "";
  const tick = () => {
    if (seconds <= 0) return launch();
    showState("queued", `${place}again in ${seconds--} s`);
    retry = setTimeout(tick, 1000);
  };
  tick();
}

function calmDown() {
  clearTimeout(retry);
  retry = null;
}

function sessionCard(s, thumb, onclick) {
  const button = element("button", "", { type: "button", onclick });
  button.dataset.session = s.session;
  if (thumb) button.append(element("img", "", { src: thumb, alt: "" }));
  button.append(element("span", `${s.model} · step ${s.step}`), element("i", s.playing ? "being played" : "rests", { className: s.playing ? "" : "resting" }));
  return button;
}

/** Sessions that this browser remembers, and those of the API key, wherever they were started. */
export async function showRecent() {
  const key = $("key").value, mine = remembered();
  const owned = key ? (await callJson("/v1/sessions", { token: key }).catch(() => ({ sessions: [] }))).sessions : [];
  const playing = new Set(owned.filter((s) => s.playing).map((s) => s.session));
  const others = owned.filter((s) => !mine.some((m) => m.session === s.session));
  $("recent").hidden = !(mine.length + others.length);
  $("recent-list").replaceChildren(
    ...mine.map((s) => sessionCard({ ...s, playing: playing.has(s.session) }, s.thumb, () => resume(s.session, s.token))),
    ...others.map((s) => sessionCard(s, null, () => resume(s.session, key))),
  );
}

async function resume(session, token) {
  calmDown();
  try {
    enter({ ...(await callJson(`/v1/sessions/${session}`, { token })), token, borrowed: token === $("key").value });
  } catch (error) {
    if (error.status === 404 || error.status === 401) forget(session);
    showRecent();
    history.replaceState(null, "", "/");
    $("launch-error").textContent = error.message;
  }
}

/** Links carry the token behind the #, which no server ever sees; it moves to this browser's memory at once. */
function readLink() {
  const link = new URLSearchParams(location.hash.slice(1)), session = link.get("session");
  if (!session) return;
  const token = link.get("token") ?? remembered().find((s) => s.session === session)?.token;
  history.replaceState(null, "", `/#session=${session}`);
  resume(session, token);
}

// -- setting up -------------------------------------------------------------------------------------------------------

function setUpPictures(isPlaying) {
  setUpPad(check, usePicture);
  $("file").onchange = () => usePictures($("file").files);
  $("drop").ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
  $("drop").ondragleave = () => $("drop").classList.remove("over");
  $("drop").ondrop = (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    usePictures(event.dataTransfer.files);
  };
  document.onpaste = (event) => {
    const files = [...event.clipboardData.files].filter((f) => f.type.startsWith("image/"));
    if (files.length && !isPlaying()) { selectTab("upload"); usePictures(files); }
  };
  $("text").oninput = useText;
}

/** `open(session)` starts to play; `isPlaying()` says whether somebody does. */
export async function setUpStart(open, isPlaying) {
  enter = open;
  setUpPictures(isPlaying);
  for (const group of [document.querySelector("[role=tablist]"), $("models"), $("gallery"), $("palette")]) roving(group);
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.onclick = () => {
      selectTab(tab.id.slice(4));
      if (tab.id === "tab-draw") drawing(usePicture);
      if (tab.id === "tab-text") useText();
    };
  }
  $("dice").onclick = () => { $("seed").value = Math.floor(Math.random() * 2 ** 32); };
  $("launch").onsubmit = launch;
  $("key").onchange = showRecent;
  await refresh();
  readLink();
}

/** Asks the server what there is. */
export async function refresh() {
  const served = await callJson("/v1/models"), before = model?.reference;
  models = served.models;
  $("key-field").hidden = !served.key_needed;
  $("tab-text").hidden = !served.text_prompts;
  showModels();
  if (models.some((m) => m.reference === before)) check($("models"), [...$("models").children].find((b) => b.dataset.reference === before));
  else chooseModel(models[0].reference);
  await showRecent();
}
