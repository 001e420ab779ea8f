// The drawing pad: one way to a first frame.

const $ = (id) => document.getElementById(id);
const COLOURS = ["#87ceeb", "#ffffff", "#1b1b1b", "#6b4a2b", "#3f9b46", "#c8c8c8", "#e8c24a", "#d9483b", "#8b5cf6", "#f29ac2"];
const pad = { colour: COLOURS[3], undo: [], last: null };

export function clearPad() {
  const context = $("pad").getContext("2d"), { width, height } = $("pad");
  context.fillStyle = COLOURS[0];
  context.fillRect(0, 0, width, height);
  context.fillStyle = COLOURS[4];
  context.fillRect(0, Math.round(height * 0.78), width, height);
  pad.undo = [];
}

function remember() {
  pad.undo.push($("pad").getContext("2d").getImageData(0, 0, $("pad").width, $("pad").height));
  if (pad.undo.length > 30) pad.undo.shift();
}

function stroke(event) {
  const canvas = $("pad"), box = canvas.getBoundingClientRect(), size = Number($("brush").value);
  const at = { x: ((event.clientX - box.left) / box.width) * canvas.width, y: ((event.clientY - box.top) / box.height) * canvas.height };
  const from = pad.last ?? at, steps = Math.max(1, Math.ceil(Math.hypot(at.x - from.x, at.y - from.y)));
  const context = canvas.getContext("2d");
  context.fillStyle = pad.colour;
  for (let i = 0; i <= steps; i++) {
    const x = from.x + ((at.x - from.x) * i) / steps, y = from.y + ((at.y - from.y) * i) / steps;
    context.fillRect(Math.round(x - size / 2), Math.round(y - size / 2), size, size);
  }
  pad.last = at;
}

export const drawing = (done) => $("pad").toBlob((blob) => done(blob));

/** `done` gets the drawing as a picture whenever it changed. */
export function setUpPad(check, done) {
  $("palette").append(...COLOURS.map((colour) => {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", onclick: () => { pad.colour = colour; check($("palette"), button); } });
    button.style.background = colour;
    button.role = "radio";
    button.ariaLabel = colour;
    return button;
  }));
  check($("palette"), $("palette").children[3]);
  const canvas = $("pad");
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    remember();
    stroke(event);
  };
  canvas.onpointermove = (event) => { if (pad.last) stroke(event); };
  canvas.onpointerup = canvas.onpointercancel = () => { pad.last = null; drawing(done); };
  $("pad-fill").onclick = () => {
    remember();
    const context = canvas.getContext("2d");
    context.fillStyle = pad.colour;
    context.fillRect(0, 0, canvas.width, canvas.height);
    drawing(done);
  };
  $("pad-undo").onclick = () => {
    if (pad.undo.length) canvas.getContext("2d").putImageData(pad.undo.pop(), 0, 0);
    drawing(done);
  };
}
