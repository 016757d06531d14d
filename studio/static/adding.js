// A field for a new tag that offers the tags of the set, most frequent first.
import { element, later } from "./dom.js";
import { get } from "./server.js";

const OFFERED = 12;
const WAIT_MS = 80;
let lists = 0;

export class Adding {
  constructor(encoder, label, { add, leave, has }) {
    Object.assign(this, { encoder, add, leave, has });
    this.offers = [];
    this.chosen = -1;
    const id = `offers-${(lists += 1)}`;
    this.list = element("ul", { id, role: "listbox", "aria-label": "Tags of the set", hidden: true });
    this.field = element("input", {
      type: "text",
      placeholder: "add a tag",
      autocomplete: "off",
      spellcheck: false,
      role: "combobox",
      "aria-label": label,
      "aria-autocomplete": "list",
      "aria-expanded": "false",
      "aria-controls": id,
      oninput: () => this.look(),
      onblur: () => this.commit(),
      onkeydown: (event) => this.pressed(event),
    });
    this.root = element("div", { class: "adding" }, this.field, this.list);
    this.look = later(() => this.ask(), WAIT_MS);
  }

  async ask() {
    const prefix = this.field.value.trim();
    if (!prefix) return this.close();
    const found = await get("/api/tags", { encoder: this.encoder, prefix, limit: OFFERED }).catch(() => ({ tags: [] }));
    if (this.field.value.trim() !== prefix || document.activeElement !== this.field) return undefined;
    this.offers = found.tags.filter(([tag]) => !this.has(tag));
    this.choose(-1);
    return undefined;
  }

  choose(index) {
    this.chosen = index;
    this.list.replaceChildren(
      ...this.offers.map(([tag, count], each) =>
        element(
          "li",
          {
            id: `${this.list.id}-${each}`,
            role: "option",
            "aria-selected": each === index,
            onmousedown: (event) => (event.preventDefault(), this.take(tag)),
          },
          element("span", {}, tag),
          element("span", { class: "soft" }, String(count)),
        ),
      ),
    );
    this.list.hidden = !this.offers.length;
    this.field.setAttribute("aria-expanded", String(!this.list.hidden));
    if (index >= 0) this.field.setAttribute("aria-activedescendant", `${this.list.id}-${index}`);
    else this.field.removeAttribute("aria-activedescendant");
  }

  take(text) {
    this.look.cancel();
    this.field.value = "";
    this.close();
    this.add(text);
  }

  /** Take what was typed and not added yet: nothing that was written is lost. */
  commit() {
    if (this.field.value.trim()) this.take(this.field.value);
    else this.close();
  }

  close() {
    this.offers = [];
    this.choose(-1);
  }

  pressed(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && this.offers.length) {
      this.choose((this.chosen + step + this.offers.length + (this.chosen < 0 && step < 0 ? 1 : 0)) % this.offers.length);
    } else if (event.key === "Enter" && (this.chosen >= 0 || this.field.value.trim())) {
      this.take(this.chosen >= 0 ? this.offers[this.chosen][0] : this.field.value);
    } else if (event.key === "Escape" && this.offers.length) {
      this.close();
      event.stopPropagation();
    } else if ((event.key === "ArrowLeft" || event.key === "Backspace") && !this.field.value) {
      this.leave();
    } else {
      return;
    }
    event.preventDefault();
  }

  focus() {
    this.field.focus();
  }
}
