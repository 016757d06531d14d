// The form of a run's command: fields of all options, what is wrong at each, and what the command would train.
import { copy } from "./about_picture.js";
import { DataSetForm } from "./data_set_form.js";
import { button, element, later } from "./dom.js";
import { FormField } from "./form_field.js";
import { get, post } from "./server.js";
import { telling } from "./toasts.js";

const CHECK_MS = 350;
const SUMMARY_MS = 1200;
const OPEN_AT_FIRST = ["Model", "Saving", "Run", "Logs"];

export class CommandForm {
  constructor({ started }) {
    this.started = started;
    this.fields = new Map();
    this.asked = 0;
    this.checkSoon = later(() => this.check(), CHECK_MS);
    this.sumSoon = later(() => this.sum(), SUMMARY_MS);
    this.preset = element("select", { "aria-label": "Begin with", onchange: () => this.preset.value && this.take(`/api/commands/preset`, { name: this.preset.value }) });
    this.search = element("input", { type: "search", placeholder: "Find an option", "aria-label": "Find an option", oninput: () => this.filter() });
    this.onlyChanged = element("input", { type: "checkbox", onchange: () => this.filter() });
    this.startButton = button("Start", () => this.start(), { class: "main", disabled: true });
    this.verdict = element("p", { role: "status", class: "verdict" });
    this.others = element("ul", { class: "notes" });
    this.groups = element("div", { class: "groups" });
    this.dataSet = new DataSetForm({ changed: () => this.changed() });
    this.summary = element("div", { class: "summary", "aria-label": "What it would train" });
    this.texts = ["TOML", "Data set", "Command", "Command for Windows"].map((name) => element("textarea", { readOnly: true, rows: name.startsWith("C") ? 3 : 8, "aria-label": name, class: "prompt-line" }));
    const shown = this.texts.map((text) =>
      element("details", { open: text.ariaLabel === "TOML" }, element("summary", {}, text.getAttribute("aria-label")), text, button("Copy", () => copy(text))),
    );
    this.dataSetText = shown[1];
    this.root = element(
      "div",
      { class: "command" },
      element("div", { class: "run-head" }, element("h2", {}, "New run"), this.preset, this.search, element("label", { class: "choice" }, this.onlyChanged, "only what is set"), element("div", { class: "actions" }, this.startButton)),
      this.verdict,
      this.others,
      element("div", { class: "command-body" }, element("div", {}, this.dataSet.root, this.groups), element("aside", { "aria-label": "The command" }, this.summary, ...shown)),
    );
  }

  /** Show the form, with the options of a run if one is named. */
  async open(run) {
    if (!this.form) {
      this.form = await telling(() => get("/api/commands/form"));
      if (!this.form) return;
      this.build();
    }
    if (run) await this.take(`/api/runs/${run}/command`);
    else this.check();
  }

  build() {
    const { groups, presets, data_set: keys } = this.form;
    this.preset.replaceChildren(element("option", { value: "" }, "Begin with …"), ...presets.map((name) => element("option", { value: name }, name.replace("/", ", ").replace("gb", " GB"))));
    this.dataSet.build(keys);
    this.groups.replaceChildren(
      ...groups.map(({ title, fields }) => {
        const made = fields.map((field) => new FormField(field, { changed: () => this.changed() }));
        for (const each of made) this.fields.set(each.name, each);
        const group = element("details", { class: "group", open: OPEN_AT_FIRST.includes(title) }, element("summary", {}, title), ...made.map((each) => each.root));
        group.fields = made;
        return group;
      }),
    );
    this.filter(); // by what was typed before they were there
  }

  /** Fill the fields with what a preset or a run has. */
  async take(path, query = {}) {
    const found = await telling(() => get(path, query));
    if (!found) return;
    for (const field of this.fields.values()) field.write(found.fields[field.name]);
    this.dataSet.write(found.data_set);
    for (const group of this.groups.children) group.open ||= group.fields.some((field) => field.isSet);
    this.filter();
    this.changed();
  }

  typed() {
    const fields = {};
    for (const field of this.fields.values()) if (field.isSet) fields[field.name] = field.read();
    return { fields, data_set: this.dataSet.read() };
  }

  changed() {
    this.startButton.disabled = true;
    this.checkSoon();
  }

  async check() {
    const asked = (this.asked += 1);
    let found;
    try {
      found = await post("/api/commands/check", this.typed());
    } catch (error) {
      found = { problems: {}, others: [error.message], is_right: false, toml: "", posix: "", windows: "", data_set: null };
    }
    if (asked !== this.asked) return;
    for (const field of this.fields.values()) field.tell(found.problems[field.name] ?? []);
    this.dataSet.tell(found.problems);
    this.others.replaceChildren(...found.others.map((problem) => element("li", { class: "problem" }, problem)));
    const wrong = Object.keys(found.problems).length;
    this.verdict.textContent = found.is_right ? "The trainer would take this command." : `${wrong + found.others.length} things are to be set right.`;
    this.verdict.classList.toggle("problem", !found.is_right);
    [this.texts[0].value, this.texts[1].value, this.texts[2].value, this.texts[3].value] = [found.toml, found.data_set ?? "", found.posix, found.windows];
    this.dataSetText.hidden = found.data_set === null;
    this.startButton.disabled = !found.is_right;
    for (const group of this.groups.children) group.open ||= group.fields.some((field) => field.isWrong && field.isSet);
    if (found.is_right) this.sumSoon();
    else this.summary.replaceChildren();
  }

  async sum() {
    const asked = this.asked;
    this.summary.replaceChildren(element("p", { class: "soft" }, "reading the set …"));
    const found = await post("/api/commands/summary", this.typed()).catch((error) => ({ parts: [["Not clear yet", [error.message]]] }));
    if (asked !== this.asked) return;
    this.summary.replaceChildren(
      element("dl", { class: "keys" }, ...found.parts.flatMap(([title, lines]) => [element("dt", {}, title), element("dd", {}, ...lines.map((line) => element("p", {}, line)))])),
    );
  }

  async start() {
    this.startButton.disabled = true;
    this.asked += 1; // what is still being checked no longer matters
    this.checkSoon.cancel();
    this.sumSoon.cancel();
    this.verdict.textContent = "starting …";
    try {
      this.started((await post("/api/commands/start", this.typed())).id);
    } catch (error) {
      this.others.replaceChildren(element("li", { class: "problem" }, error.message));
      this.verdict.textContent = "It was not started.";
      this.startButton.disabled = false;
    }
  }

  filter() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const group of this.groups.children) {
      for (const field of group.fields) field.root.hidden = !field.answers(words) || (this.onlyChanged.checked && !field.isSet);
      group.hidden = group.fields.every((field) => field.root.hidden);
      if (words.length || this.onlyChanged.checked) group.open = true;
    }
  }
}
