// A picture as the reader sees it: with the grid by which the model cuts it, and what it costs in tokens.

const template = document.getElementById("picture-template");
const numbers = new Intl.NumberFormat("en");

export class Picture {
  /** onRemove is called once, when the reader removes the picture. */
  constructor(file, onRemove) {
    this.file = file;
    this.dataUrl = null; // set by read()
    this.refused = false; // whether the server has said that it cannot take it
    this.element = template.content.firstElementChild.cloneNode(true);
    this.url = URL.createObjectURL(file);
    this.find(".remove").addEventListener("click", () => onRemove(this));
    this.find(".remove").setAttribute("aria-label", `Remove ${this.name}`);
    const image = this.find(".frame img");
    image.alt = this.name;
    image.src = this.url;
  }

  get name() {
    return this.file.name || "picture";
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  /** Reads the file into a data URL, the form in which it is sent, and waits until it is shown. */
  async read() {
    const reader = new FileReader();
    await new Promise((resolve, reject) => {
      reader.onload = resolve;
      reader.onerror = () => reject(new Error(`${this.name} cannot be read: ${reader.error.message}`));
      reader.readAsDataURL(this.file);
    });
    this.dataUrl = reader.result;
    const image = this.find(".frame img");
    const isShown = await image.decode().then(() => true, () => false); // a server may read more formats than a browser
    if (isShown) this.keepRatio(image.naturalWidth, image.naturalHeight);
    this.element.classList.toggle("blank", !isShown);
  }

  part() {
    return { type: "image_url", image_url: { url: this.dataUrl } };
  }

  /** Draws the grid. layout: an entry of `pictures` in the answer of /tokenize. */
  showLayout({ width, height, columns, rows, thumbnail, tokens }) {
    const image = this.find(".frame img");
    // The model may ignore that a photograph is marked as turned. Then it is shown as the model sees it.
    const isTurned = image.naturalWidth === height && image.naturalHeight === width && width !== height;
    this.element.classList.toggle("stored", isTurned);
    this.keepRatio(width, height);
    const grid = this.find(".grid");
    grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
    grid.replaceChildren(...Array.from({ length: columns * rows }, () => document.createElement("i")));
    if (thumbnail) this.find(".thumbnail img").src = this.url;
    this.find(".thumbnail").hidden = !thumbnail;
    const tiles = columns * rows === 1 ? "1 tile" : `${columns} × ${rows} tiles`;
    const cut = thumbnail ? `${tiles} + thumbnail` : tiles;
    this.say([`${width} × ${height}`, cut, `${numbers.format(tokens)} tokens`, ...(isTurned ? ["unrotated"] : [])]);
  }

  showError(message) {
    this.element.classList.add("failed");
    this.say([`${this.name}: ${message}`]);
  }

  /** Takes away what only a picture that was not sent yet has. */
  settle(isSent) {
    this.find(".remove").hidden = isSent;
  }

  release() {
    this.element.remove();
    URL.revokeObjectURL(this.url);
  }

  say(facts) {
    const spans = facts.map((fact) => Object.assign(document.createElement("span"), { textContent: fact }));
    this.find(".layout").replaceChildren(...spans);
  }

  keepRatio(width, height) {
    this.element.style.setProperty("--ratio", width / height);
  }
}
