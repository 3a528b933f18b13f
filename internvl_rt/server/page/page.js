// The conversation: pictures and a question go out with all that was said before, and the answer streams in.

import { askForKeyWith, readEvents, send, ServerError } from "./api.js";
import { Picture } from "./picture.js";
import { Turn } from "./turn.js";

const find = (id) => document.getElementById(id);
const numbers = new Intl.NumberFormat("en");
const question = find("question");
const main = find("conversation");
const stillness = matchMedia("(prefers-reduced-motion: reduce)");

let turns = [];
let draft = []; // pictures of the next question
let stopper = null; // the AbortController of the answer that streams
let model = null; // its description by the server
let loading = null; // the promise of it

// ---- the model

/** Asks for the model's description, unless it is there. Asks again after a failure. */
function loadModel() {
  loading ??= send("/v1/models")
    .then((response) => response.json())
    .then(({ data }) => {
      model = data[0];
      showModel(model);
    })
    .catch((error) => {
      loading = null;
      find("facts").textContent = error.message;
      throw error;
    });
  return loading;
}

function showModel({ id, device, dtype, limits, sampling_defaults }) {
  document.title = id;
  find("model").textContent = find("model").title = id;
  find("facts").textContent = `${device === "cpu" ? "CPU" : device} · ${dtype}`;
  showContext(0);
  const bytes = Math.min(limits.max_image_bytes, (limits.max_body_bytes * 3) / 4);
  find("limits").textContent = `Up to ${limits.max_images} in a conversation, ${formatBytes(bytes)} each.`;
  find("max-tokens").max = limits.max_tokens;
  find("max-tokens").value ||= Math.min(sampling_defaults?.max_tokens ?? 1024, limits.max_tokens);
  find("temperature").value ||= sampling_defaults?.temperature ?? 0;
  showSettings();
}

// ---- settings

function showSettings() {
  const { max_completion_tokens: most, temperature } = readSettings();
  const values = `${most ? numbers.format(most) : "default"} tokens, temperature ${temperature ?? "default"}`;
  find("show-settings").querySelector("span").textContent = `: ${values}`;
}

function readSettings() {
  const read = (id) => (find(id).value === "" ? undefined : find(id).valueAsNumber);
  return { max_completion_tokens: read("max-tokens"), temperature: read("temperature") };
}

function areSettingsValid() {
  if (find("settings").querySelector(":invalid") === null) return true;
  find("settings").showPopover();
  find("settings").querySelector(":invalid").reportValidity();
  return false;
}

// ---- pictures

async function addFiles(files) {
  notify("");
  const complaints = [];
  await loadModel().catch((error) => notify(error.message));
  if (!model) return;
  for (const file of files) {
    const complaint = findComplaint(file, model.limits);
    if (complaint) complaints.push(complaint);
    else addPicture(new Picture(file, removePicture));
  }
  notify(complaints.join("\n"));
}

/** Says why a file cannot be sent, so that it is not uploaded in vain; empty if it can. */
function findComplaint(file, limits) {
  const name = file.name || "The picture";
  const kept = [...turns.filter((turn) => turn.isKept).flatMap((turn) => turn.pictures), ...draft];
  if (file.type && !file.type.startsWith("image/")) return `${name} is not a picture, but ${file.type}.`;
  if (file.size > limits.max_image_bytes) {
    const most = formatBytes(limits.max_image_bytes);
    return `${name} has ${formatBytes(file.size)}; the server takes pictures of at most ${most}.`;
  }
  if (kept.length >= limits.max_images) {
    return `${name} is one too many: a conversation has at most ${limits.max_images} pictures. Begin a new one.`;
  }
  const sent = [...kept.map((picture) => picture.file), file].reduce((sum, { size }) => sum + (size * 4) / 3, 0);
  if (sent > limits.max_body_bytes) {
    const most = formatBytes(limits.max_body_bytes);
    return `With ${name} the conversation would take ${formatBytes(sent)} to send; the server takes at most ${most}.`;
  }
  return "";
}

async function addPicture(picture) {
  draft.push(picture);
  showDraft();
  main.scrollTop = main.scrollHeight;
  try {
    await picture.read();
    const body = { model: model.id, messages: [{ role: "user", content: [picture.part()] }] };
    const { pictures } = await (await send("/tokenize", { body })).json();
    follow(() => picture.showLayout(pictures[0]));
  } catch (error) {
    picture.refused = !picture.dataUrl || error.status === 400 || error.status === 413;
    picture.showError(error.message);
  }
}

function removePicture(picture) {
  draft = draft.filter((other) => other !== picture);
  picture.release();
  notify("");
  showDraft();
  question.focus();
}

function showDraft() {
  find("draft").querySelector(".pictures").append(...draft.map((picture) => picture.element));
  find("draft").hidden = draft.length === 0;
  find("empty").hidden = draft.length + turns.length > 0;
  question.placeholder = turns.length ? "Go on asking" : draft.length ? "Ask about the picture" : "Ask a question";
}

// ---- questions and answers

function submit() {
  const text = question.value.trim();
  if (stopper || !(text || draft.length) || !areSettingsValid()) return;
  if (draft.some(({ refused }) => refused)) return notify("Remove the picture that cannot be taken, then send.");
  if (draft.some(({ dataUrl }) => !dataUrl)) return notify("A picture is still being read; send in a moment.");
  notify("");
  for (const turn of turns) turn.leave();
  const turn = new Turn(text, draft, { follow, onAgain: askAgain, onEdit: edit });
  for (const picture of draft) picture.settle(true);
  turns.push(turn);
  draft = [];
  question.value = "";
  find("turns").append(turn.element);
  showDraft();
  ask(turn);
}

async function ask(turn) {
  if (stopper || !areSettingsValid()) return;
  const mine = (stopper = new AbortController());
  const settings = readSettings();
  turn.begin();
  showBusy();
  main.scrollTop = main.scrollHeight;
  announce("The question was sent.");
  try {
    await loadModel();
    const response = await send("/v1/chat/completions", {
      body: {
        model: model.id,
        messages: turns.filter((other) => other === turn || other.isKept).flatMap((other) => other.messages()),
        stream: true,
        stream_options: { include_usage: true },
        ...settings,
      },
      headers: { "x-internvl-rt-timings": "1" },
      signal: mine.signal,
    });
    for await (const event of readEvents(response, mine.signal)) turn.take(event);
    turn.finish();
    if (turn.usage) showContext(turn.usage.prompt_tokens + turn.usage.completion_tokens);
    announce("The answer is complete.");
  } catch (error) {
    if (mine.signal.aborted) return turn.stop();
    turn.fail(error);
    if (!(error instanceof ServerError)) throw error; // a fault of the page, which the console shall have
  } finally {
    if (stopper === mine) stopper = null;
    showBusy();
  }
}

function askAgain(turn) {
  question.focus(); // the button that has the focus goes away
  ask(turn);
}

/** Makes a failed question the next one again, before what was typed since. */
function edit(turn) {
  if (stopper) return;
  turns = turns.filter((other) => other !== turn);
  draft = [...turn.pictures, ...draft];
  for (const picture of turn.pictures) picture.settle(false);
  question.value = [turn.question, question.value].filter(Boolean).join("\n");
  showDraft();
  turn.element.remove();
  question.focus();
}

function startAnew() {
  stopper?.abort();
  stopper = null;
  for (const picture of [...turns.flatMap((turn) => turn.pictures), ...draft]) picture.release();
  turns = [];
  draft = [];
  find("turns").replaceChildren();
  if (model) showContext(0);
  question.value = "";
  notify("");
  showDraft();
  showBusy();
  question.focus();
}

// ---- what the reader sees and hears

/** Calls write, which adds to the conversation, and stays at its end if the reader is there. With an element to reveal,
 *  what is read there stays in sight, and the page only glides until the element is seen too. */
function follow(write, reveal = null) {
  const isAtEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 48;
  const height = main.scrollHeight;
  write();
  if (!isAtEnd) return;
  if (!reveal) main.scrollTop = main.scrollHeight;
  else if (main.scrollHeight > height) {
    reveal.scrollIntoView({ block: "nearest", behavior: stillness.matches ? "instant" : "smooth" });
  }
}

function showBusy() {
  find("send").textContent = stopper ? "Stop" : "Send";
  find("send").classList.toggle("stop", stopper !== null);
}

function notify(message) {
  follow(() => {
    find("notice").textContent = message;
    find("notice").hidden = message === "";
  });
}

function showContext(used) {
  find("context").textContent = `${numbers.format(used)} of ${numbers.format(model.max_model_len)} tokens`;
}

function announce(message) {
  find("status").textContent = message;
}

function formatBytes(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${numbers.format(Math.round(bytes / 1e4) / 100)} MB`;
}

/** Returns the key that the reader types into the dialog; null if none. */
function askForKey(reason) {
  const [dialog, field] = [find("key-dialog"), find("key")];
  find("key-reason").textContent = reason;
  field.value = dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const read = () => resolve(dialog.returnValue === "use" ? field.value.trim() : null);
    dialog.addEventListener("close", read, { once: true });
  });
}

// ---- events

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (stopper) stopper.abort();
  else submit();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  const isForOther = document.querySelector("dialog[open], :popover-open") !== null;
  if (event.key === "Escape" && stopper && !isForOther) stopper.abort();
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length === 0) return;
  event.preventDefault();
  addFiles(files);
});

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!hasFiles(event)) return;
  event.preventDefault();
  addFiles([...event.dataTransfer.files]);
  question.focus();
});

for (const id of ["add", "empty"]) find(id).addEventListener("click", () => find("files").click());
find("files").addEventListener("change", (event) => {
  addFiles([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
  question.focus();
});
find("settings").addEventListener("input", showSettings);
find("settings").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // would send the question
  find("settings").hidePopover();
});
find("new").addEventListener("click", startAnew);
find("key-cancel").addEventListener("click", () => find("key-dialog").close());
find("key-dialog").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault(); // the page's policy lets no form go anywhere
  find("key-dialog").close("use");
});

askForKeyWith(askForKey);
showDraft();
question.focus();
loadModel().catch(() => {}); // the header says what went wrong, and the next question tries again
