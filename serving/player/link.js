// The play socket, from the player's side: lockstep, reconnects with jitter, and no step lost or taken twice.

const HEADER_BYTES = 24;
const GREETING = 1;

/** One session's connection. Callbacks: onFrame(frame), onState(state, text). */
export class Link {
  constructor(session, token, { onFrame, onState }) {
    Object.assign(this, { session, token, onFrame, onState });
    this.step = -1; // newest committed step that we know of
    this.pending = null; // { n, action, at }: asked for and not answered
    this.attempt = 0;
    this.closed = false;
    this.asleep = false;
  }

  connect() {
    if (this.socket && this.socket.readyState <= WebSocket.OPEN) return;
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const url = `${scheme}//${location.host}/v1/sessions/${this.session}/play`;
    const socket = new WebSocket(url, ["lampworks.v1", `token.${this.token}`]);
    socket.binaryType = "arraybuffer";
    socket.onmessage = (event) => this.receive(event.data);
    socket.onclose = (event) => this.lost(event);
    this.socket = socket;
    this.closed = this.asleep = false;
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    this.socket?.close(1000);
  }

  get free() {
    return !this.pending && this.socket?.readyState === WebSocket.OPEN && this.step >= 0;
  }

  /** Asks for the next step; false while the last one is on its way. */
  act(action) {
    if (this.asleep) this.connect();
    if (!this.free) return false;
    this.pending = { n: this.step + 1, action, at: performance.now() };
    this.ask();
    return true;
  }

  ask() {
    const message = new DataView(new ArrayBuffer(5));
    message.setUint32(0, this.pending.n, true);
    message.setUint8(4, this.pending.action);
    this.socket.send(message.buffer);
  }

  receive(data) {
    if (this.closed) return; // still on its way when the player left
    if (typeof data === "string") {
      const { state, position } = JSON.parse(data);
      this.attempt = 0;
      this.onState(state, state === "queued" ? `number ${position} in line` : state);
      return;
    }
    const view = new DataView(data);
    const micros = (at) => view.getUint32(at, true) / 1000;
    const frame = {
      flags: view.getUint8(1), action: view.getUint8(2), step: view.getUint32(4, true),
      queue: micros(8), model: micros(12), encode: micros(16) + micros(20), roundTrip: null,
      blob: new Blob([data.slice(HEADER_BYTES)], { type: "image/jpeg" }),
    };
    this.step = Math.max(this.step, frame.step);
    this.attempt = 0;
    if (this.pending && frame.step >= this.pending.n) {
      if (!(frame.flags & GREETING)) frame.roundTrip = performance.now() - this.pending.at;
      this.pending = null;
    } else if (this.pending && frame.flags & GREETING) {
      this.ask(); // the step went down with the old connection
    }
    this.onState("live", "live");
    this.onFrame(frame);
  }

  lost({ code, reason }) {
    if (this.closed) return;
    if (code === 4408) {
      this.asleep = true;
      this.onState("idle", "asleep");
    } else if (code >= 4400 && code < 4500 && code !== 4429) {
      this.closed = true;
      this.onState("stopped", code === 4410 ? "opened elsewhere" : "stopped", reason, code);
    } else {
      const base = code === 4429 || code === 4503 ? 2000 : 100;
      const wait = Math.min(5000, base * 2 ** Math.min(this.attempt++, 6)) * (0.5 + Math.random() / 2);
      this.onState("resuming", this.attempt > 1 ? `resuming (try ${this.attempt})` : "resuming", reason);
      this.timer = setTimeout(() => this.connect(), wait);
    }
  }
}
