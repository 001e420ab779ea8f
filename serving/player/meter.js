// Honest numbers: what a player waits for, and where.

const $ = (id) => document.getElementById(id);

/** Shows rate, round trip and where it went, from the frames of the last seconds. */
export function measure(game) {
  game.times = game.times.slice(-60);
  game.frames = game.frames.filter((at) => at > performance.now() - 3000);
  const span = game.frames.at(-1) - game.frames[0];
  $("fps").textContent = game.frames.length > 2 ? (((game.frames.length - 1) * 1000) / span).toFixed(1) : "–";
  const newest = game.times.at(-1);
  $("rtt").textContent = newest ? newest.roundTrip.toFixed(newest.roundTrip < 10 ? 1 : 0) : "–";
  drawSpark(game.times.map((t) => t.roundTrip));
  $("split-text").replaceChildren();
  if (!newest) return;
  const parts = { queue: newest.queue, model: newest.model, encode: newest.encode };
  parts.net = Math.max(0, newest.roundTrip - parts.queue - parts.model - parts.encode);
  for (const [name, ms] of Object.entries(parts)) {
    $("split").querySelector(`.${name}`).style.inlineSize = `${(100 * ms) / newest.roundTrip}%`;
    const item = document.createElement("span"), dot = document.createElement("i");
    dot.className = name;
    item.append(dot, `${{ encode: "encode, commit", net: "network" }[name] ?? name} ${ms.toFixed(1)}`);
    $("split-text").append(item, " ");
  }
}

function drawSpark(values) {
  const canvas = $("spark"), context = canvas.getContext("2d"), { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  if (values.length < 2) return;
  const top = Math.max(...values) * 1.1, x = (i) => (i / 59) * width, y = (v) => height - 2 - (v / top) * (height - 4);
  context.beginPath();
  values.forEach((v, i) => (i ? context.lineTo(x(i), y(v)) : context.moveTo(x(i), y(v))));
  Object.assign(context, { strokeStyle: "#ffb454", lineWidth: 1.5, lineJoin: "round" });
  context.stroke();
  context.lineTo(x(values.length - 1), height);
  context.lineTo(0, height);
  context.fillStyle = "#ffb45422";
  context.fill();
}
