// One tag of a caption: a button that becomes a field while the tag is edited.
//
// What a chip shows is changed in place. A new element under the pointer would end a drag, and a click would be lost.
import { element } from "./dom.js";
import { marked } from "./marks.js";

export class Chip {
  /**
   * `focused(chip)`, `dragged(chip)` and `dragEnded()` tell what the pointer and the focus do. `edited(chip, text)` ends
   * an edit, with null for one that was given up, and `removed(chip)` asks for the end of the tag.
   */
  constructor({ focused, dragged, dragEnded, edited, removed }) {
    this.edited = edited;
    this.button = element("button", {
      type: "button",
      class: "chip",
      onclick: () => this.edit(),
      onfocus: () => focused(this),
      "aria-keyshortcuts": "Enter Delete Alt+ArrowLeft Alt+ArrowRight",
    });
    this.cross = element("button", { type: "button", class: "remove", tabIndex: -1, onclick: () => removed(this) }, "×");
    this.root = element("li", { draggable: true }, this.button, this.cross);
    this.root.addEventListener("dragstart", (event) => {
      event.dataTransfer.effectAllowed = "move";
      event.dataTransfer.setData("text/plain", this.tag);
      dragged(this);
      requestAnimationFrame(() => this.root.classList.toggle("is-dragged", this.isDragged));
    });
    this.root.addEventListener("dragend", () => dragEnded());
  }

  /** Show a tag. `isCut` says that it lies over the limit, `shared` which words stand in the other caption too. */
  show(tag, isCut, shared) {
    const marks = marked(tag, "", shared);
    const shown = JSON.stringify([tag, isCut, marks.map((mark) => mark.nodeName + mark.textContent)]);
    if (shown === this.shown) return;
    Object.assign(this, { tag, shown });
    this.button.replaceChildren(...marks);
    if (isCut) this.button.setAttribute("aria-description", "over the limit: not read");
    else this.button.removeAttribute("aria-description");
    this.root.classList.toggle("is-cut", isCut);
    this.cross.setAttribute("aria-label", `Remove ${tag}`);
  }

  setDragged(isDragged) {
    this.isDragged = isDragged;
    if (!isDragged) this.root.classList.remove("is-dragged");
  }

  edit() {
    this.field = element("input", { type: "text", value: this.tag, "aria-label": `Edit ${this.tag}` });
    this.field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      this.endEdit(event.key === "Enter", true);
    });
    this.field.addEventListener("blur", () => this.endEdit(true));
    this.root.replaceChildren(this.field);
    this.root.draggable = false;
    this.field.focus();
    this.field.select();
  }

  get isEdited() {
    return this.field !== undefined;
  }

  /** End an edit, if there is one. */
  endEdit(isKept, isFocused = false) {
    const { field } = this;
    if (!field) return;
    this.field = undefined; // first: its removal is a blur too
    this.root.replaceChildren(this.button, this.cross);
    this.root.draggable = true;
    this.edited(this, isKept ? field.value : null, isFocused);
  }
}
