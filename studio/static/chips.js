// A caption as tags: moved by drag or by keys, edited, removed, and added with what the set has already.
import { element } from "./dom.js";
import { marked } from "./marks.js";
import { Adding } from "./adding.js";

export class Chips {
  constructor(encoder, label, { changed }) {
    this.encoder = encoder;
    this.changed = changed;
    this.separator = ",";
    this.tags = [];
    this.focused = 0;
    this.list = element("ol", { class: "chips", "aria-label": label });
    this.adding = new Adding(encoder, `Add a tag to ${encoder.toUpperCase()}`, {
      add: (text) => this.set([...this.tags, ...this.split(text)]),
      leave: () => this.focusChip(this.tags.length - 1),
      has: (tag) => this.tags.includes(tag),
    });
    this.root = element("div", {}, this.list, this.adding.root);
    this.list.addEventListener("keydown", (event) => this.pressed(event));
    this.list.addEventListener("dragover", (event) => this.draggedOver(event));
    this.list.addEventListener("drop", (event) => event.preventDefault());
  }

  split(text) {
    return text.split(this.separator).map((tag) => tag.trim()).filter(Boolean);
  }

  show(text, separator = this.separator) {
    this.separator = separator;
    this.tags = this.split(text);
    this.render();
  }

  set(tags, focused = this.focused) {
    this.tags = tags;
    this.focused = Math.max(0, Math.min(focused, tags.length - 1));
    this.render();
    this.changed(tags.join(`${this.separator} `));
  }

  mark(count) {
    this.count = count;
    this.render();
  }

  render() {
    const hadFocus = this.list.contains(document.activeElement) && document.activeElement.tagName === "BUTTON";
    if (this.list.contains(document.activeElement) && !hadFocus) return; // a tag is being edited
    const text = this.tags.join(`${this.separator} `);
    const cut = this.count?.final === null ? this.count.cut : "";
    const kept = cut && text.endsWith(cut) ? text.length - cut.length : text.length;
    let end = 0;
    const chips = this.tags.map((tag, index) => {
      end += tag.length + (index ? this.separator.length + 1 : 0);
      return this.chip(tag, index, end > kept);
    });
    this.list.replaceChildren(...chips);
    if (hadFocus) this.focusChip(this.focused);
  }

  chip(tag, index, isCut) {
    const shown = element(
      "button",
      {
        type: "button",
        class: "chip",
        tabIndex: index === this.focused ? 0 : -1,
        onclick: () => ((this.focused = index), this.edit(index)),
        onfocus: () => (this.focused = index),
        "aria-description": isCut ? "over the limit: not read" : undefined,
        "aria-keyshortcuts": "Enter Delete Alt+ArrowLeft Alt+ArrowRight",
      },
      ...marked(tag, "", this.count?.shared ?? new Set()),
    );
    const remove = element(
      "button",
      { type: "button", class: "remove", tabIndex: -1, "aria-label": `Remove ${tag}`, onclick: () => this.remove(index) },
      "×",
    );
    const item = element("li", { class: isCut ? "is-cut" : "", draggable: true }, shown, remove);
    item.addEventListener("dragstart", (event) => {
      this.dragged = index;
      event.dataTransfer.effectAllowed = "move";
      event.dataTransfer.setData("text/plain", tag);
      requestAnimationFrame(() => item.classList.add("is-dragged"));
    });
    item.addEventListener("dragend", () => this.dropped());
    return item;
  }

  draggedOver(event) {
    if (this.dragged === undefined) return;
    event.preventDefault();
    const over = event.target.closest("li");
    for (const item of this.list.children) item.classList.toggle("is-target", item === over);
    this.target = over ? [...this.list.children].indexOf(over) : this.tags.length - 1;
  }

  dropped() {
    const { dragged, target } = this;
    this.dragged = this.target = undefined;
    if (dragged !== undefined && target !== undefined && target !== dragged) this.move(dragged, target);
    else this.render();
  }

  move(from, to) {
    if (to < 0 || to >= this.tags.length) return;
    const tags = [...this.tags];
    tags.splice(to, 0, ...tags.splice(from, 1));
    this.set(tags, to);
  }

  remove(index) {
    this.set(this.tags.filter((_, each) => each !== index), index);
    if (this.tags.length) this.focusChip(this.focused);
    else this.adding.focus();
  }

  edit(index) {
    const item = this.list.children[index];
    const field = element("input", { type: "text", value: this.tags[index], "aria-label": `Edit ${this.tags[index]}` });
    let isOver = false;
    const finish = (isKept) => {
      if (isOver) return;
      isOver = true;
      field.remove();
      if (isKept) this.set(this.tags.flatMap((tag, each) => (each === index ? this.split(field.value) : [tag])), index);
      else this.render();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      finish(event.key === "Enter");
      this.focusChip(this.focused);
    });
    field.addEventListener("blur", () => finish(true));
    item.replaceChildren(field);
    field.focus();
    field.select();
  }

  pressed(event) {
    if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey) return;
    const index = this.focused;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && event.altKey) this.move(index, index + step);
    else if (step && index + step >= this.tags.length) this.adding.focus();
    else if (step) this.focusChip(index + step);
    else if (event.altKey) return;
    else if (event.key === "Home") this.focusChip(0);
    else if (event.key === "End") this.focusChip(this.tags.length - 1);
    else if (event.key === "Delete" || event.key === "Backspace") this.remove(index);
    else return;
    event.preventDefault();
    if (step && event.altKey) this.focusChip(this.focused);
  }

  focusChip(index) {
    if (index < 0 || index >= this.tags.length) return;
    this.focused = index;
    [...this.list.children].forEach((item, each) => {
      const chip = item.querySelector(".chip");
      if (chip) chip.tabIndex = each === index ? 0 : -1;
    });
    this.list.children[index]?.querySelector(".chip")?.focus();
  }

  focus() {
    this.adding.focus();
  }
}
