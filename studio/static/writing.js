// A caption as text: a field with marks behind the letters.
import { element } from "./dom.js";
import { marked } from "./marks.js";

export class Writing {
  constructor(label, { changed }) {
    this.marks = element("div", { class: "marks", "aria-hidden": "true" });
    this.field = element("textarea", {
      "aria-label": label,
      spellcheck: true,
      oninput: () => changed(this.field.value),
      onscroll: () => (this.marks.scrollTop = this.field.scrollTop),
      onkeydown: (event) => event.key === "Enter" && !event.ctrlKey && event.preventDefault(), // a line is a variant
    });
    this.root = element("div", { class: "writing" }, this.marks, this.field);
    new ResizeObserver(() => (this.marks.style.height = `${this.field.offsetHeight}px`)).observe(this.field);
  }

  show(text) {
    if (this.field.value !== text) this.field.value = text;
    this.mark(null);
  }

  /** Show what is cut off and what stands in both captions. */
  mark(count) {
    const cut = count && count.final === null ? count.cut : "";
    this.marks.replaceChildren(...marked(this.field.value, cut, count?.shared ?? new Set()), "\n");
    this.marks.scrollTop = this.field.scrollTop;
  }

  focus() {
    this.field.focus();
  }
}
