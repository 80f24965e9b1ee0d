import { Player, RATE } from "/page/player.js";
import { Session, toBase64, toSamples } from "/page/session.js";

const byId = (id) => document.getElementById(id);
const status = (text) => (byId("status").textContent = text);
const TIME = {
  type: "function",
  name: "get_date_time",
  description: "Get the current local date, time, weekday and UTC offset.",
};
let session = null, context = null, player = null, microphone = null;
let answering = false; // a response is under way
let asked = 0, waitingForText = false, waitingForSound = false;
const lines = new Map(); // of the conversation, by item
const calls = new Set(); // of tools that were answered, whose response goes on

// --- what is shown

function line(item, role) {
  if (!lines.has(item)) {
    const made = byId("talk").appendChild(document.createElement("li"));
    made.className = role;
    lines.set(item, made);
  }
  byId("talk").scrollTop = byId("talk").scrollHeight;
  return lines.get(item);
}

function note(text) {
  line(`note ${lines.size}`, "note").textContent = text;
}

function measure(id, since) {
  byId(id).textContent = `${Math.round(performance.now() - since)} ms`;
}

function question() {
  [asked, waitingForText, waitingForSound] = [performance.now(), true, true];
}

// --- requests beside the session

async function request(path, options = {}) {
  const key = byId("key").value;
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { ...options, headers });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error?.message ?? response.statusText);
  return body;
}

async function loadVoices(chosen) {
  const { data } = await request("/v1/audio/voices");
  byId("voice").replaceChildren(...data.map(({ name }) => new Option(name, name, false, name === chosen)));
}

// --- the session

function settings() {
  const turns = byId("turns").value;
  const voice = byId("voice").value;
  return {
    type: "realtime",
    ...(byId("instructions").value && { instructions: byId("instructions").value }),
    tools: byId("tools").checked ? [TIME] : [],
    think: byId("think").checked,
    audio: {
      input: { transcription: {}, turn_detection: turns ? { type: turns } : null },
      output: voice ? { voice } : {},
    },
  };
}

function update() {
  session?.send("session.update", { session: settings() });
}

async function connect() {
  if (session) return;
  if (context === null) {
    context = new AudioContext({ sampleRate: RATE });
    player = new Player(context);
    player.onquiet = settle;
    const audio = new Audio();
    if (!(await player.connect(audio))) note("The echo canceller may not know what is played here: use headphones.");
  }
  await context.resume();
  await new Promise((resolve, reject) => {
    session = new Session(byId("key").value);
    session
      .on("session.created", () => { update(); resolve(); })
      .on("session.updated", () => status("connected"))
      .on("closed", ({ code }) => { end(code); reject(new Error(`the connection was closed (${code})`)); })
      .on("error", ({ error }) => error.code === "response_cancel_not_active" || note(error.message))
      .on("input_audio_buffer.speech_started", ({ item_id }) => { interrupt(false); line(item_id, "user").textContent = "…"; })
      .on("input_audio_buffer.speech_stopped", question)
      .on("conversation.item.input_audio_transcription.completed", (event) => (line(event.item_id, "user").textContent = event.transcript || "(nothing)"))
      .on("conversation.item.input_audio_transcription.failed", (event) => (line(event.item_id, "user").textContent = "(not understood)"))
      .on("response.created", () => (answering = true))
      .on("response.output_audio_transcript.delta", (event) => said(event))
      .on("response.output_audio_transcript.done", (event) => (line(event.item_id, "assistant").textContent = event.transcript))
      .on("response.output_audio.delta", (event) => heard(event))
      .on("response.function_call_arguments.done", (event) => call(event))
      .on("response.done", ({ response }) => done(response));
  });
}

function said({ item_id, delta }) {
  if (waitingForText) measure("first-text", asked);
  waitingForText = false;
  line(item_id, "assistant").textContent += delta;
}

function heard({ item_id, delta }) {
  if (waitingForSound) measure("first-sound", asked);
  waitingForSound = false;
  byId("interrupt").disabled = false;
  player.play(item_id, toSamples(delta));
}

// An answer that was made and played cannot be interrupted any more.
function settle() {
  if (!answering && !player.playing) byId("interrupt").disabled = true;
}

function done(response) {
  answering = false;
  settle();
  if (response.status === "cancelled") for (const { id } of response.output) lines.get(id)?.classList.add("cut");
  if (response.status === "failed") note(response.status_details.error.message);
  const answered = response.output.filter((item) => calls.delete(item.call_id));
  if (answered.length === 0) return;
  question();
  session.send("response.create");
}

function call({ call_id, name }) {
  note(`${name}()`);
  const output = name === TIME.name ? new Date().toString() : `error: there is no tool ${name}`;
  calls.add(call_id);
  session.send("conversation.item.create", { item: { type: "function_call_output", call_id, output } });
}

// Silence first; then the server is told how much was heard.
function interrupt(cancel = true) {
  const started = performance.now(), cut = player?.stop();
  byId("interrupt").disabled = true;
  if (cancel && session) session.send("response.cancel");
  if (!cut) return;
  measure("interrupted", started);
  session.send("conversation.item.truncate", { item_id: cut.item, content_index: 0, audio_end_ms: cut.ms });
  lines.get(cut.item)?.classList.add("cut");
}

function end(code) {
  player?.stop();
  silence();
  session = null;
  status(code === 1006 ? "refused: is the API key right?" : "not connected");
}

// --- the microphone

async function listen() {
  if (!navigator.mediaDevices) throw new Error("a browser gives the microphone to https and localhost only");
  const media = await navigator.mediaDevices.getUserMedia({
    audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true, channelCount: 1 },
  });
  await context.audioWorklet.addModule("/page/microphone.js");
  const node = new AudioWorkletNode(context, "microphone");
  context.createMediaStreamSource(media).connect(node);
  node.port.onmessage = ({ data }) => session?.send("input_audio_buffer.append", { audio: toBase64(data) });
  microphone = { media, node };
  byId("start").setAttribute("aria-pressed", "true");
  byId("start").firstChild.textContent = "Stop ";
  status("listening");
}

function silence() {
  microphone?.media.getTracks().forEach((track) => track.stop());
  microphone?.node.disconnect();
  microphone = null;
  byId("start").setAttribute("aria-pressed", "false");
  byId("start").firstChild.textContent = "Talk ";
}

async function toggle() {
  if (microphone === null) {
    await connect();
    interrupt();
    await listen();
    return;
  }
  silence();
  status("connected");
  if (!byId("turns").value) {
    session.send("input_audio_buffer.commit");
    question();
    session.send("response.create");
  }
}

// --- what the user does

const tell = (work) => async (event) => {
  event?.preventDefault();
  try { await work(event); } catch (error) { note(error.message); }
};

byId("start").onclick = tell(toggle);
byId("interrupt").onclick = tell(() => interrupt());
byId("options").onchange = tell(async ({ target }) => {
  if (target === byId("key")) await loadVoices();
  update();
});
byId("options").onsubmit = (event) => event.preventDefault();
byId("write").onsubmit = tell(async () => {
  const text = byId("text").value.trim();
  if (!text) return;
  byId("text").value = "";
  await connect();
  interrupt(player.playing);
  const id = `item_${crypto.getRandomValues(new Uint32Array(2)).join("")}`;
  line(id, "user").textContent = text;
  const item = { id, type: "message", role: "user", content: [{ type: "input_text", text }] };
  session.send("conversation.item.create", { item });
  question();
  session.send("response.create");
});
byId("add-voice").onsubmit = tell(async () => {
  const form = new FormData(), name = byId("voice-name").value;
  form.append("name", name);
  form.append("audio_sample", byId("voice-file").files[0]);
  await request("/v1/audio/voices", { method: "POST", body: form });
  await loadVoices(name);
  update();
  note(`voice ${name} was added`);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") interrupt();
  if (event.altKey && event.code === "KeyT") { event.preventDefault(); byId("start").click(); }
});

tell(() => loadVoices())();
