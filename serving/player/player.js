// The player page: choose a first frame (start.js), press keys (game.js), watch the world go on.
import { isPlaying, open, setUpGame } from "./game.js";
import { $, showState } from "./page.js";
import { refresh, setUpStart } from "./start.js";

$("help-open").onclick = () => $("help").showModal();
setUpGame(() => refresh().catch(() => {}));
setUpStart(open, isPlaying).catch((error) => {
  $("launch-error").textContent = error.message;
  showState("stopped", "no server");
});
