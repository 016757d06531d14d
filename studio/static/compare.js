// Two images over each other with a wipe, their difference, or side by side; they are moved and enlarged together.
import { button, element } from "./dom.js";

const MODES = ["Wipe", "Difference", "Side by side"];
const LARGEST = 32;

export class Compare {
  constructor({ closed }) {
    this.closed = closed;
    this.title = element("h3");
    const choice = (label) => element("select", { "aria-label": label, onchange: () => this.look() });
    this.first = choice("Left or lower image");
    this.second = choice("Right or upper image");
    this.slider = element("input", { type: "range", min: 0, "aria-label": "Step of the second image", oninput: () => this.pick(Number(this.slider.value)) });
    this.modes = MODES.map((mode) => button(mode, () => this.setMode(mode), { "aria-pressed": "false" }));
    this.images = [0, 1].map(() => element("img", { alt: "", draggable: false, onerror: () => this.told("an image cannot be read") }));
    this.halves = this.images.map((image) => element("div", { class: "half" }, image));
    this.wipe = element("input", { type: "range", class: "wipe", min: 0, max: 1000, value: 500, "aria-label": "Wipe", oninput: () => this.place() });
    this.line = element("div", { class: "wipe-line", "aria-hidden": "true" });
    this.stage = element("div", { class: "stage", tabIndex: 0, role: "group", "aria-label": "Images" }, ...this.halves, this.line);
    this.said = element("p", { class: "soft", role: "status" });
    this.root = element(
      "div",
      { class: "compare", hidden: true },
      element("div", { class: "look-tools" }, button("Back to all samples", () => this.close()), this.title),
      element(
        "div",
        { class: "look-tools" },
        this.first,
        this.second,
        this.slider,
        element("div", { class: "segments", role: "group", "aria-label": "How to compare" }, ...this.modes),
        button("−", () => this.enlarge(1 / 1.5), { "aria-label": "Smaller" }),
        button("+", () => this.enlarge(1.5), { "aria-label": "Larger" }),
        button("Whole", () => this.reset()),
      ),
      this.wipe,
      this.stage,
      this.said,
    );
    this.stage.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.stage.addEventListener("pointerdown", (event) => this.began(event));
    this.stage.addEventListener("pointermove", (event) => this.moved(event));
    for (const name of ["pointerup", "pointercancel"]) this.stage.addEventListener(name, () => (this.drag = null));
    this.reset();
  }

  get isOpen() {
    return !this.root.hidden;
  }

  open(sides, first, second, title) {
    this.sides = sides;
    this.title.textContent = title;
    for (const select of [this.first, this.second]) {
      select.replaceChildren(...sides.map(({ label }, index) => element("option", { value: index }, label)));
    }
    this.first.value = Math.max(0, first);
    this.second.value = Math.max(0, second);
    this.slider.max = sides.length - 1;
    this.root.hidden = false;
    this.reset();
    this.setMode(this.mode ?? "Wipe");
    this.look();
    this.stage.focus();
  }

  look() {
    this.told("");
    [this.first, this.second].forEach((select, index) => {
      const side = this.sides[Number(select.value)];
      if (this.images[index].getAttribute("src") !== side.address) this.images[index].src = side.address;
      this.images[index].alt = side.label;
    });
    this.slider.value = this.second.value;
    this.slider.setAttribute("aria-valuetext", this.sides[Number(this.second.value)].label);
    this.told(`${this.images[0].alt} and ${this.images[1].alt}`);
  }

  pick(index, select = this.second) {
    select.value = Math.min(Math.max(0, index), this.sides.length - 1);
    this.look();
  }

  setMode(mode) {
    this.mode = mode;
    this.modes.forEach((each) => each.setAttribute("aria-pressed", String(each.textContent === mode)));
    this.stage.dataset.mode = mode;
    this.wipe.hidden = this.line.hidden = mode !== "Wipe";
    this.place();
  }

  place() {
    const share = this.wipe.value / 10;
    this.halves[1].style.clipPath = this.mode === "Wipe" ? `inset(0 0 0 ${share}%)` : "none";
    this.line.style.left = `${share}%`;
    for (const image of this.images) image.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.scale})`;
  }

  reset() {
    Object.assign(this, { x: 0, y: 0, scale: 1 });
    this.place();
  }

  /** Enlarge around a place of the stage, its middle by default. */
  enlarge(factor, atX = this.halves[0].clientWidth / 2, atY = this.halves[0].clientHeight / 2) {
    const scale = Math.min(LARGEST, Math.max(0.5, this.scale * factor));
    this.x = atX - ((atX - this.x) * scale) / this.scale;
    this.y = atY - ((atY - this.y) * scale) / this.scale;
    this.scale = scale;
    this.stage.classList.toggle("large", scale > 3);
    this.place();
  }

  wheel(event) {
    event.preventDefault();
    const box = event.target.closest(".half")?.getBoundingClientRect() ?? this.stage.getBoundingClientRect();
    this.enlarge(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.clientX - box.left, event.clientY - box.top);
  }

  began(event) {
    const box = this.stage.getBoundingClientRect();
    const atLine = this.mode === "Wipe" && Math.abs(event.clientX - box.left - (box.width * this.wipe.value) / 1000) < 14;
    this.drag = { atLine, x: event.clientX - this.x, y: event.clientY - this.y };
    this.stage.setPointerCapture(event.pointerId);
  }

  moved(event) {
    if (!this.drag) return;
    if (this.drag.atLine) {
      const box = this.stage.getBoundingClientRect();
      this.wipe.value = (1000 * (event.clientX - box.left)) / box.width;
    } else {
      this.x = event.clientX - this.drag.x;
      this.y = event.clientY - this.drag.y;
    }
    this.place();
  }

  pressed(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return false;
    const select = event.shiftKey ? this.first : this.second;
    const step = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (step) this.pick(Number(select.value) + step, select);
    else if (event.key === "Escape") this.close();
    else if (event.key === "+") this.enlarge(1.5);
    else if (event.key === "-") this.enlarge(1 / 1.5);
    else if (event.key === "0") this.reset();
    else if ("wds".includes(event.key.toLowerCase()) && event.key.length === 1) this.setMode(MODES["wds".indexOf(event.key.toLowerCase())]);
    else return false;
    return true;
  }

  told(text) {
    this.said.textContent = text;
  }

  close() {
    this.root.hidden = true;
    for (const image of this.images) image.removeAttribute("src");
    this.closed();
  }
}
