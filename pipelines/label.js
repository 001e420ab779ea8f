// One clip at a time: its film runs, a key rates it, the next one comes. The next rating waits for the answer.
const token = location.hash.slice(1);
const headers = { Authorization: `Bearer ${token}` };
const [screen, progress] = ["screen", "progress"].map((id) => document.getElementById(id));
const FRAMES = 32, FRAME_MS = 150;
let clip = null, busy = true, frame = 0;

async function ask(path, options = {}) {
  busy = true;
  try {
    const answer = await fetch(path, { headers, ...options });
    if (!answer.ok) throw new Error(await answer.text());
    await show(await answer.json());
  } catch (error) {
    progress.textContent = `not saved: ${error.message}`;
  }
  busy = false;
}

async function show({ clip: next, rated, total }) {
  progress.textContent = next ? `${rated} of ${total} rated` : `all ${total} rated, thank you`;
  clip = next;
  screen.style.backgroundImage = "none";
  if (!clip) return;
  const film = new Image();
  film.src = `film/${clip}?token=${encodeURIComponent(token)}`;
  await film.decode();
  if (film.src.includes(clip)) {
    screen.style.aspectRatio = `${film.naturalWidth / FRAMES} / ${film.naturalHeight}`;
    screen.style.backgroundImage = `url("${film.src}")`;
    screen.dataset.clip = clip;
    frame = 0;
  }
}

function rate(stars) {
  if (!busy && clip) ask("rate", { method: "POST", body: JSON.stringify({ clip, stars }) });
}

function undo() {
  if (!busy) ask("rate", { method: "POST", body: JSON.stringify({ undo: true }) });
}

setInterval(() => {
  screen.style.backgroundPositionX = `${(100 * (frame++ % FRAMES)) / (FRAMES - 1)}%`;
}, FRAME_MS);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if ("12345".includes(event.key)) rate(Number(event.key));
  else if (event.key === "Backspace") undo();
  else if (event.key === " ") frame = 0;
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-stars]")) {
  button.addEventListener("click", () => rate(Number(button.dataset.stars)));
}
document.getElementById("undo").addEventListener("click", undo);
ask("next");
