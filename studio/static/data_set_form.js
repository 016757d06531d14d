// A data set file as tables of keys: what holds for all, data sets, and their folders.
import { button, element } from "./dom.js";

export class DataSetForm {
  constructor({ changed }) {
    this.changed = changed;
    this.written = element("input", { type: "checkbox", id: "writes-data-set", onchange: () => (this.show(), changed()) });
    this.body = element("div", { class: "data-set" });
    this.root = element("section", { class: "group", "aria-label": "Data set" }, element("label", { class: "choice" }, this.written, "Write the data set here: folders, captions and buckets of each (in place of --dataset_config)"), this.body);
    this.set({ general: {}, datasets: [{ keys: {}, subsets: [{}] }] });
  }

  build(keys) {
    this.keys = keys;
    this.show();
  }

  set(typed) {
    this.typed = typed;
  }

  /** Show what a preset has; null leaves the data set to the options. */
  write(typed) {
    this.written.checked = Boolean(typed);
    if (typed) this.set(typed);
    this.show();
  }

  read() {
    return this.written.checked ? this.typed : null;
  }

  tell(problems) {
    for (const each of this.body.querySelectorAll("[data-place]")) {
      const said = problems[each.dataset.place] ?? [];
      each.textContent = said.join("\n");
      each.hidden = !said.length;
    }
  }

  show() {
    this.body.hidden = !this.written.checked;
    if (!this.keys) return;
    let subset = 0;
    this.body.replaceChildren(
      this.table("general", 0, "For all", this.typed.general),
      ...this.typed.datasets.map((dataset, number) =>
        element(
          "div",
          { class: "data-set-table" },
          this.table("datasets", number, `Data set ${number + 1}`, dataset.keys),
          ...dataset.subsets.map((keys, index) => this.table("subsets", subset++, `Folder ${index + 1}`, keys, dataset.subsets.length > 1 && (() => dataset.subsets.splice(index, 1)))),
          button("Add a folder", () => this.change(() => dataset.subsets.push({ image_dir: "" }))),
        ),
      ),
      button("Add a data set", () => this.change(() => this.typed.datasets.push({ keys: { resolution: "1024" }, subsets: [{ image_dir: "" }] }))),
    );
  }

  change(action) {
    action();
    this.show();
    this.changed();
  }

  table(kind, number, title, values, remove) {
    const expects = new Map(this.keys[kind].map(({ name, expects: text }) => [name, text]));
    if (kind === "subsets") values.image_dir ??= "";
    const rows = Object.keys(values).map((key) => {
      const id = `${kind}-${number}-${key}`;
      return element(
        "div",
        { class: "form-field text" },
        element("label", { for: id }, key),
        element("input", { id, type: "text", value: values[key], placeholder: expects.get(key) ?? "", spellcheck: false, oninput: (event) => ((values[key] = event.target.value), this.changed()) }),
        key === "image_dir" ? null : button("×", () => this.change(() => delete values[key]), { "aria-label": `Remove ${key}` }),
        element("p", { class: "field-problem", hidden: true }),
      );
    });
    rows.forEach((row, index) => (row.lastChild.dataset.place = `${kind}.${number}.${Object.keys(values)[index]}`));
    const add = element(
      "select",
      { "aria-label": `Add a key to ${title}`, onchange: () => this.change(() => (values[add.value] = "")) },
      element("option", { value: "" }, "add a key …"),
      ...[...expects.keys()].filter((key) => !(key in values)).map((key) => element("option", { value: key }, key)),
    );
    return element("fieldset", {}, element("legend", {}, title), ...rows, add, remove ? button("Remove this folder", () => this.change(remove)) : null);
  }
}
