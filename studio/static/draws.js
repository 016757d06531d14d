// What training will see: ten draws of both final captions.
import { button, element } from "./dom.js";
import { get } from "./server.js";
import { telling } from "./toasts.js";

export class Draws {
  constructor() {
    this.root = element("section", { class: "draws wide", "aria-label": "What training will see" });
  }

  close() {
    this.root.replaceChildren(
      button("What training will see", () => this.show(this.id, 1), { "aria-keyshortcuts": "Alt+W" }),
    );
  }

  of(id) {
    this.id = id;
    this.close();
  }

  async show(id = this.id, first = 1) {
    const found = await telling(() => get(`/api/images/${id}/draws`, { first }));
    if (!found || id !== this.id) return;
    const last = first + found.draws.length - 1;
    this.root.replaceChildren(
      element("h3", {}, "What training will see"),
      element(
        "p",
        { class: "note" },
        `The captions of epochs ${first} to ${last}, drawn with seed ${found.seed}` +
          (found.warms_up ? ", after tag warm-up." : "."),
      ),
      element(
        "table",
        {},
        element("colgroup", {}, element("col", { class: "epoch" }), element("col"), element("col")),
        element("thead", {}, element("tr", {}, ...["epoch", "L", "G"].map((name) => element("th", { scope: "col" }, name)))),
        element("tbody", {}, ...found.draws.map(row)),
      ),
      element(
        "div",
        { class: "dialog-actions" },
        button("Hide", () => this.close()),
        button("Ten more", () => this.show(id, last + 1)),
      ),
    );
  }
}

function row(draw) {
  return element("tr", {}, element("th", { scope: "row" }, String(draw.epoch)), cell(draw.l), cell(draw.g));
}

function cell({ is_dropped: isDropped, reading }) {
  if (isDropped) return element("td", { class: "dropped" }, "dropped");
  const made = element("td", {}, reading.kept || element("span", { class: "dropped" }, "empty"));
  if (reading.cut) made.append(element("del", {}, reading.cut));
  return made;
}
