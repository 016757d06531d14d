// One image, large, with both captions beside it.
import { button, byId, element, later } from "./dom.js";
import { Card } from "./card.js";
import { Draws } from "./draws.js";
import { get, post } from "./server.js";
import { telling, toast } from "./toasts.js";

const COUNT_MS = 60;

export class Editor {
  /** `view()` is the list of images, `closed(index)` is called when the editor is left, `history(news)` after saves. */
  constructor({ view, closed, history }) {
    Object.assign(this, { view, closed, history });
    this.root = byId("editor");
    this.isOpen = false;
    this.visit = 0;
    this.cards = {};
    for (const encoder of ["l", "g"]) {
      this.cards[encoder] = new Card(encoder, { typed: () => this.count(), written: (answer) => this.history(answer) });
    }
    this.count = later(() => this.askCounts(), COUNT_MS);
    this.draws = new Draws();
    this.name = element("h2");
    this.place = element("span", { class: "soft" });
    this.image = element("img", { alt: "" });
    this.crop = element("div", { class: "crop", title: "The part that is trained" });
    this.picture = element("div", { class: "picture" }, this.image, this.crop);
    this.room = element("div", { class: "room" }, this.picture);
    this.facts = element("p", { class: "facts" });
    this.shared = element("p", { class: "shared-words note wide" });
    this.build();
    new ResizeObserver(() => this.fit()).observe(this.room);
  }

  build() {
    const bar = element(
      "div",
      { class: "editor-bar" },
      button("‹", () => this.step(-1), { "aria-label": "Previous image", title: "Previous image (Page Up)" }),
      button("›", () => this.step(1), { "aria-label": "Next image", title: "Next image (Page Down)" }),
      this.name,
      this.place,
      element("span", { class: "spring" }),
      button("Copy from previous", () => this.copyFromPrevious(), { title: "Alt+C, for the caption that is being written" }),
      button("All images", () => this.close(), { title: "Escape" }),
    );
    const desk = element(
      "div",
      { class: "desk" },
      this.cards.l.root,
      this.cards.g.root,
      this.shared,
      this.draws.root,
    );
    this.root.replaceChildren(bar, element("div", { class: "stage" }, this.room, this.facts), desk);
    for (const [encoder, card] of Object.entries(this.cards)) {
      card.root.addEventListener("focusin", () => (this.current = encoder));
    }
  }

  get isDirty() {
    return Object.values(this.cards).some((card) => card.saving?.isDirty);
  }

  async flush(settings) {
    const done = await Promise.all(Object.values(this.cards).map((card) => card.flush(settings)));
    return done.every(Boolean);
  }

  /** Show an image of the list. */
  async open(index) {
    const visit = (this.visit += 1);
    this.wanted = index;
    const isLeft = !this.isOpen || (await this.leave());
    if (visit !== this.visit) return;
    const id = this.view().ids[index];
    const found = isLeft && id !== undefined ? await telling(() => get(`/api/images/${id}`)) : undefined;
    if (visit !== this.visit) return;
    if (!found) {
      this.wanted = this.index;
      return;
    }
    this.id = id;
    this.index = index;
    const wasOpen = this.isOpen;
    this.isOpen = true;
    this.root.hidden = false;
    byId("overview").inert = true;
    this.show(found);
    for (const [encoder, card] of Object.entries(this.cards)) card.open(id, found.captions[encoder]);
    this.draws.of(id);
    this.askCounts();
    this.cards[wasOpen ? (this.current ?? "l") : "l"].focus();
    this.prefetch();
  }

  show(found) {
    const { size, bucket, crop, name } = found;
    this.name.textContent = name;
    this.name.title = `${found.subset}/${name}`;
    this.place.textContent = `${this.index + 1} of ${this.view().ids.length}`;
    this.image.src = `/pictures/${found.id}?v=${found.version}`;
    this.image.alt = name;
    this.size = size;
    this.crop.hidden = !crop;
    if (crop) {
      const [left, top, width, height] = crop.map((part) => `${100 * part}%`);
      Object.assign(this.crop.style, { left, top, width, height });
    }
    const sizes = size ? `${size.join(" × ")} pixels` + (bucket ? `, trained at ${bucket.join(" × ")}` : "") : "";
    this.facts.textContent = found.problem ?? sizes;
    this.fit();
  }

  /** Make the image as large as its place allows. */
  fit() {
    const [width, height] = this.size ?? [1, 1];
    const scale = Math.min(this.room.clientWidth / width, this.room.clientHeight / height);
    this.picture.style.width = `${Math.floor(width * scale)}px`;
    this.picture.style.height = `${Math.floor(height * scale)}px`;
  }

  prefetch() {
    const { ids, versions } = this.view();
    const next = this.index + 1;
    if (next < ids.length) new Image().src = `/pictures/${ids[next]}?v=${versions[next]}`;
  }

  async askCounts() {
    const { id } = this;
    const texts = Object.fromEntries(Object.entries(this.cards).map(([encoder, card]) => [encoder, card.text]));
    const counts = await post("/api/count", { id, ...texts }).catch(() => null);
    if (!counts || id !== this.id) return;
    const shared = new Set(counts.shared);
    for (const [encoder, card] of Object.entries(this.cards)) {
      if (card.text === texts[encoder]) card.mark({ ...counts[encoder], shared });
    }
    this.shared.textContent = shared.size ? `In both captions: ${counts.shared.join(", ")}` : "";
  }

  /** Read the captions again, after undo or a change by somebody else. */
  async refresh() {
    const { id } = this;
    const found = await get(`/api/images/${id}`).catch(() => null);
    if (!found || id !== this.id) return;
    for (const [encoder, card] of Object.entries(this.cards)) card.seen(found.captions[encoder]);
    this.askCounts();
  }

  step(by) {
    const next = this.wanted + by;
    if (next < 0 || next >= this.view().ids.length) toast(by > 0 ? "That was the last image." : "This is the first image.");
    else this.open(next);
  }

  async leave() {
    if (await this.flush()) return true;
    toast("This caption is not saved yet: see the message beside it.", true);
    return false;
  }

  async close() {
    this.visit += 1; // of an image that is still on its way
    if (!(await this.leave())) return;
    this.isOpen = false;
    this.root.hidden = true;
    byId("overview").inert = false;
    this.image.removeAttribute("src");
    this.closed(this.index);
  }

  async copyFromPrevious() {
    const previous = this.view().ids[this.index - 1];
    if (previous === undefined) return toast("There is no image before this one.");
    const encoder = this.current ?? "l";
    const found = await telling(() => get(`/api/images/${previous}`));
    if (found) this.cards[encoder].replace(found.captions[encoder].variants[0]);
    return undefined;
  }

  focus(encoder) {
    this.cards[encoder].focus();
  }
}
