// One question and its answer: the text as it streams, and what it took, stage by stage beside the least possible.

const template = document.getElementById("turn-template");
const numbers = new Intl.NumberFormat("en");

export class Turn {
  /** follow(write) calls write, and keeps the end of the conversation in sight if it was; see page.js. */
  constructor(question, pictures, { follow, onAgain, onEdit }) {
    this.question = question;
    this.pictures = pictures;
    this.follow = follow;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.find(".question .text").textContent = question;
    this.find(".pictures").append(...pictures.map((picture) => picture.element));
    this.find(".again").addEventListener("click", () => onAgain(this));
    this.find(".edit").addEventListener("click", () => onEdit(this));
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  get isKept() {
    return this.answer !== ""; // an exchange without an answer is not part of the conversation
  }

  messages() {
    const text = this.question ? [{ type: "text", text: this.question }] : [];
    const asked = { role: "user", content: [...this.pictures.map((picture) => picture.part()), ...text] };
    return this.answer ? [asked, { role: "assistant", content: this.answer }] : [asked];
  }

  begin() {
    this.answer = "";
    this.finishReason = this.usage = this.timings = null;
    this.answerText = new Text();
    this.reasoningText = new Text();
    this.unwritten = { answer: "", reasoning: "" };
    this.frame = 0;
    this.find(".words > .text").replaceChildren(this.answerText);
    this.find(".reasoning .text").replaceChildren(this.reasoningText);
    this.find(".reasoning").hidden = true;
    this.find(".failure").hidden = this.find(".note").hidden = true;
    this.setState("streaming");
  }

  /** Takes an event of the stream. What it says is written with the next frame. */
  take(event) {
    const choice = event.choices?.[0];
    const delta = choice?.delta ?? {};
    this.unwritten.answer += delta.content ?? "";
    this.unwritten.reasoning += delta.reasoning_content ?? "";
    this.answer += delta.content ?? "";
    this.finishReason = choice?.finish_reason ?? this.finishReason;
    this.usage = event.usage ?? this.usage;
    this.timings = event.timings ?? this.timings;
    this.frame ||= requestAnimationFrame(() => this.write());
  }

  write() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { answer, reasoning } = this.unwritten;
    this.unwritten = { answer: "", reasoning: "" };
    if (!answer && !reasoning) return;
    this.follow(() => {
      this.answerText.appendData(answer);
      this.reasoningText.appendData(reasoning);
      if (reasoning) this.find(".reasoning").hidden = false;
    });
  }

  finish() {
    this.write();
    this.follow(() => {
      this.setState("finished");
      if (!this.answer) this.note("The model ended its answer at once.");
      if (this.finishReason === "length") this.note("Cut at the most tokens that the settings or the context allow.");
      this.showFigures();
    }, this.find(".headline"));
  }

  stop() {
    if (!this.answer) return this.fail(new Error("Stopped before the first token."));
    this.write();
    this.setState("stopped");
    this.note("Stopped.");
  }

  fail(error) {
    this.write();
    this.answer = "";
    this.follow(() => {
      this.setState("failed");
      this.find(".failure").hidden = false;
      this.find(".failure p").textContent = error.message;
    });
  }

  /** Takes away the offer to send a failed question again: the conversation has gone on without it. */
  leave() {
    if (this.isKept) return;
    for (const button of this.element.querySelectorAll(".failure button")) button.hidden = true;
    this.note("This question is not part of the conversation.");
  }

  setState(state) {
    this.element.dataset.state = state;
    this.find(".words > .text").setAttribute("aria-busy", String(state === "streaming"));
  }

  note(text) {
    this.find(".note").textContent = text;
    this.find(".note").hidden = false;
  }

  showFigures() {
    const { usage, timings } = this;
    const show = (name, text) => (this.find(`[data-figure="${name}"]`).textContent = text);
    const count = (value) => (value === undefined ? "–" : numbers.format(value));
    show("prompt", count(usage?.prompt_tokens));
    show("image", count(usage?.prompt_tokens_details?.image_tokens));
    show("cached", count(usage?.prompt_tokens_details?.cached_tokens));
    show("answer", count(usage?.completion_tokens));
    if (!timings) return;
    show("first", formatSeconds(timings.first_token_s));
    show("speed", timings.per_token_s ? formatFigure(1 / timings.per_token_s) : "–");
    show("total", formatSeconds(timings.total_s));
    const rows = [...this.element.querySelectorAll("[data-stage]")];
    const longest = Math.max(...rows.map((row) => timings[row.dataset.stage]), Number.MIN_VALUE);
    for (const row of rows) fillRow(row, timings[row.dataset.stage], timings.floors?.[row.dataset.stage], longest);
    this.find("table").classList.toggle("floorless", !timings.floors);
    this.find(".roof").textContent = timings.floors
      ? `Floor: the least time that the hardware allows (${timings.roof}).`
      : "Floor: unknown. It is computed from the known speed of a GPU, and there is none for this device.";
  }
}

function fillRow(row, taken, floor, longest) {
  const [takenBar, floorBar] = row.querySelectorAll("i");
  takenBar.style.inlineSize = `${(100 * taken) / longest}%`;
  floorBar.style.inlineSize = `${(100 * (floor ?? 0)) / longest}%`;
  const [, , takenCell, floorCell, shareCell] = row.children;
  takenCell.textContent = formatSeconds(taken);
  floorCell.textContent = floor === undefined ? "–" : formatSeconds(floor);
  shareCell.textContent = floor && taken ? `${Math.round((100 * floor) / taken)} %` : "–";
}

function formatSeconds(seconds) {
  if (seconds === 0) return "0 ms";
  return seconds < 0.9995 ? `${formatFigure(1000 * seconds)} ms` : `${formatFigure(seconds)} s`;
}

/** Formats with three significant digits, and whole numbers in full. */
function formatFigure(value) {
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}
