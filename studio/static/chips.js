// A caption as tags: moved by drag or by keys, edited, removed, and added with what the set has already.
import { element } from "./dom.js";
import { Adding } from "./adding.js";
import { Chip } from "./chip.js";

export class Chips {
  constructor(encoder, label, { changed }) {
    this.encoder = encoder;
    this.changed = changed;
    this.separator = ",";
    this.tags = [];
    this.chips = [];
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
    this.list.addEventListener("drop", (event) => this.dropped(event));
  }

  split(text) {
    return text.split(this.separator).map((tag) => tag.trim()).filter(Boolean);
  }

  get text() {
    return this.tags.join(`${this.separator} `);
  }

  get isEditing() {
    return this.chips.some((chip) => chip.isEdited);
  }

  /** Take what is being typed into a field and is not part of the caption yet. */
  commit() {
    for (const chip of [...this.chips]) chip.endEdit(true);
    this.adding.commit();
  }

  show(text, separator = this.separator) {
    this.separator = separator;
    const tags = this.split(text);
    if (tags.join("\n") !== this.tags.join("\n")) this.endDrag(); // the tag under the pointer is another one now
    this.tags = tags;
    this.render();
  }

  set(tags, focused = this.focused) {
    this.tags = tags;
    this.focused = Math.max(0, Math.min(focused, tags.length - 1));
    this.render();
    this.changed(this.text);
  }

  mark(count) {
    this.count = count;
    this.render();
  }

  render() {
    const hadFocus = this.list.contains(document.activeElement) && document.activeElement.tagName === "BUTTON";
    while (this.chips.length > this.tags.length) this.chips.pop().root.remove();
    while (this.chips.length < this.tags.length) this.chips.push(this.chip());
    this.list.append(...this.chips.filter(({ root }) => !root.parentNode).map(({ root }) => root));
    const { text } = this;
    const cut = this.count?.final === null ? this.count.cut : "";
    const kept = cut && text.endsWith(cut) ? text.length - cut.length : text.length;
    const shared = this.count?.shared ?? new Set();
    let end = 0;
    this.chips.forEach((chip, index) => {
      end += this.tags[index].length + (index ? this.separator.length + 1 : 0);
      chip.show(this.tags[index], end > kept, shared);
      chip.button.tabIndex = index === this.focused ? 0 : -1;
    });
    if (hadFocus) this.focusChip(this.focused);
  }

  chip() {
    return new Chip({
      focused: (chip) => (this.focused = this.chips.indexOf(chip)),
      dragged: (chip) => {
        this.dragged = chip;
        chip.setDragged(true);
      },
      dragEnded: () => this.endDrag(),
      edited: (chip, text, isFocused) => this.edited(chip, text, isFocused),
      removed: (chip) => this.remove(this.chips.indexOf(chip)),
    });
  }

  draggedOver(event) {
    if (this.dragged === undefined) return;
    event.preventDefault();
    const over = event.target.closest("li");
    this.target = this.chips.find(({ root }) => root === over) ?? this.chips.at(-1);
    for (const { root } of this.chips) root.classList.toggle("is-target", root === over);
  }

  dropped(event) {
    event.preventDefault();
    const [from, to] = [this.dragged, this.target].map((chip) => this.chips.indexOf(chip));
    this.endDrag();
    if (from >= 0 && to >= 0 && to !== from) this.move(from, to);
  }

  endDrag() {
    this.dragged?.setDragged(false);
    for (const { root } of this.chips) root.classList.remove("is-target");
    this.dragged = this.target = undefined;
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

  edited(chip, text, isFocused) {
    const index = this.chips.indexOf(chip);
    if (text !== null) this.set(this.tags.flatMap((tag, each) => (each === index ? this.split(text) : [tag])), index);
    if (isFocused) this.focusChip(this.focused);
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
    this.chips.forEach(({ button }, each) => (button.tabIndex = each === index ? 0 : -1));
    this.chips[index].button.focus();
  }

  focus() {
    this.adding.focus();
  }
}
