// The page: what a person asks for, and what the studio says of itself. Text of others is only ever textContent.
import {Player} from "/player.js";

const at = (id) => document.getElementById(id);
const prompt = at("prompt");

// Who this window is. It survives a reload, so the one who started a video still directs it.
let who = sessionStorage.getItem("who");
if (!who) {
  who = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  sessionStorage.setItem("who", who);
}

let state = {running: false, yours: true, video: 0, figures: {}};
let image = null;          // a file that the next video is to start from
let started = null;        // the one that the last video started from
let complaint = "";        // what went wrong with what this window asked for
let lost = "";             // why there is no connection
let busy = false;          // a request is under way
let changed = null;        // {video, version, since}: the last thing asked for, until its picture is here
let measured = {};         // what this window has measured of it, in seconds
let video = 0;             // whose frames are shown

const player = new Player(at("picture"), {
  onState(news) {
    lost = "";
    if (news.error !== state.error || news.video !== state.video) complaint = "";
    if (!news.running && state.running) player.forget();
    state = news;
    render();
  },
  onFrame(frame, now) {
    video = frame.video;
    if (changed && frame.video === changed.video && frame.version >= changed.version) {
      measured[changed.version ? "delay" : "first"] = now - changed.since;
      changed = null;
    }
    document.body.classList.add("shown");
  },
  onLost(line) {
    lost = line;
    render();
  },
});
player.watch(who);

// ------------------------------------------------------------------------------------------------------------- asking

async function post(path, body) {
  busy = true;
  complaint = "";
  render();
  try {
    const answer = await fetch(path, {method: "POST", body, headers: {"Content-Type": "application/octet-stream"}});
    const value = await answer.json();
    if (!answer.ok) throw new Error(value.error);
    return value;
  } catch (error) {
    complaint = error instanceof TypeError ? "The server cannot be reached." : error.message;
    return null;
  } finally {
    busy = false;
    render();
  }
}

async function start(seed) {
  const text = new TextEncoder().encode(JSON.stringify({who, prompt: prompt.value, seed}));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, text.length);
  const since = performance.now() / 1000;
  const given = image;
  const value = await post("/start", new Blob(given ? [length, text, given] : [length, text]));
  if (value) {
    measured = {video: value.video};
    changed = {video: value.video, version: 0, since};
    if (given) started = given;
  }
}

async function ask() {
  if (!prompt.value.trim()) {
    complaint = "Write a prompt first.";
    render();
    return;
  }
  if (!state.running || fresh()) {
    await start(null);
    return;
  }
  const since = performance.now() / 1000;
  const value = await post("/prompt", JSON.stringify({who, prompt: prompt.value}));
  if (!value) return;
  if (measured.video !== state.video) measured = {video: state.video};
  changed = {video: state.video, version: value.version, since};
}

// Whether there is an image that the running video has not started from.
function fresh() {
  return image !== null && image !== started;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!busy && state.yours) ask();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
prompt.addEventListener("input", () => {
  fitPrompt();
  render();
});
at("again").addEventListener("click", () => start(null));
at("stop").addEventListener("click", () => post("/stop", JSON.stringify({who})));
at("save").addEventListener("click", (event) => {
  if (at("save").getAttribute("aria-disabled") === "true") event.preventDefault();
});

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 132)}px`;
}

// -------------------------------------------------------------------------------------------------------------- image

function choose(file) {
  if (image) URL.revokeObjectURL(at("thumb").src);
  image = file;
  at("thumb").hidden = !file;
  at("clear").hidden = !file;
  if (file) at("thumb").src = URL.createObjectURL(file);
  if (!file) at("file").value = "";
  render();
}

at("file").addEventListener("change", () => {
  if (at("file").files.length) choose(at("file").files[0]);
});
at("clear").addEventListener("click", () => choose(null));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", kind === "dragenter" || kind === "dragover");
    const files = event.dataTransfer?.files;
    if (kind === "drop" && files?.length) choose(files[0]);
  });
}
prompt.addEventListener("paste", (event) => {
  const file = event.clipboardData?.files[0];
  if (file?.type.startsWith("image/")) {
    event.preventDefault();
    choose(file);
  }
});

// ------------------------------------------------------------------------------------------------------------ showing

function write(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}

const none = "\u2013";
const seconds = (value) => (value === null || value === undefined ? none : `${value.toFixed(2)} s`);
const rate = (value) => (value ? `${value.toFixed(value < 9.95 ? 1 : 0)} / s` : none);

const memory = (bytes) => {
  if (!bytes) return none;
  return bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${Math.round(bytes / 2 ** 20)} MiB`;
};

function line() {
  if (lost) return [lost, "wrong"];
  if (complaint) return [complaint, "wrong"];
  if (state.error) return [state.error, "wrong"];
  if (state.lost) return [state.lost, "wrong"];
  if (!state.yours) return ["Somebody else directs this video. You are watching.", ""];
  if (state.running && !state.owner) return ["Whoever directed this video has left: you may go on.", ""];
  if (state.running && !state.frames) return ["The first frames are being made.", ""];
  if (changed?.version) return ["The prompt changes with the next chunk.", ""];
  const {made} = state.figures;
  if (state.running && made && made < state.fps - 0.5) {
    return [`The model makes ${made.toFixed(1)} frames a second, the video has ${state.fps}: shown as made.`, ""];
  }
  if (state.running && state.full) return ["Ten minutes are kept for saving: what comes now is only shown.", ""];
  return ["", ""];
}

function render() {
  const {figures} = state;
  const mine = measuredHere();
  write("first", seconds(mine.first ?? figures.first));
  write("delay", seconds(mine.delay ?? figures.shown));
  write("made", rate(figures.made));
  write("shown", state.running ? rate(player.rate()) : none);
  write("ahead", state.running ? seconds(figures.ahead) : none);
  write("stalls", state.video ? String(figures.stalls) : none);
  write("host", memory(figures.memory?.host));
  write("gpu", memory(figures.memory?.gpu));
  at("gpu").parentElement.hidden = !figures.memory?.gpu;
  write("seed", state.video ? String(state.seed) : none);

  const [text, kind] = line();
  write("line", text);
  at("line").className = kind;
  write("badge", state.windows > 1 ? `${state.windows} watching` : "");
  at("badge").hidden = !(state.windows > 1);
  write("now", state.prompt ?? "");
  at("now").hidden = !state.video || (state.yours && prompt.value.trim() === state.prompt);

  const allowed = state.yours && !lost && !busy;
  write("go", !state.running ? "Start" : fresh() ? "Restart" : "Change");
  at("go").disabled = !allowed;
  at("stop").disabled = !(allowed && state.running);
  at("again").disabled = !(allowed && state.video && prompt.value.trim());
  at("save").setAttribute("aria-disabled", String(!state.kept));
  at("save").title = state.full ? "The first ten minutes are kept" : "What was shown so far";
  document.body.classList.toggle("running", state.running);
  document.body.classList.toggle("watching", !state.yours);
  if (state.example) document.getElementById("prompt").placeholder = state.example;
  if (state.size) document.body.style.setProperty("--ratio", String(state.size[1] / state.size[0]));
}

// What this window measured is what it shows, as long as the same video runs.
function measuredHere() {
  return measured.video === state.video ? measured : {};
}

addEventListener("resize", fitPrompt);
setInterval(render, 500);
fitPrompt();
render();

// For tests and for the curious: what this window has seen.
window.live = {player, get state() { return state; }, get measured() { return measured; }, get video() { return video; }};
