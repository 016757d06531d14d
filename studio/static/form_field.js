// A field of the form: its name, what it takes and means, and what is wrong with what was typed.
import { element } from "./dom.js";

export class FormField {
  constructor({ name, kind, expects, choices, default: byDefault, help }, { changed }) {
    Object.assign(this, { name, kind, help, byDefault });
    const id = `field-${name}`;
    const about = { id, "aria-describedby": `${id}-help ${id}-problem` };
    if (kind === "switch") this.input = element("input", { ...about, type: "checkbox", onchange: changed });
    else if (kind === "choice") {
      const shown = byDefault === null ? "not set" : `${byDefault} (default)`;
      this.input = element("select", { ...about, onchange: changed }, element("option", { value: "" }, shown), ...choices.filter((each) => each !== String(byDefault)).map((each) => element("option", { value: each }, each)));
    } else if (kind === "list") this.input = element("textarea", { ...about, rows: 1, oninput: changed, placeholder: "one a line", spellcheck: false });
    else this.input = element("input", { ...about, type: "text", oninput: changed, placeholder: byDefault === null ? expects : `${[byDefault].flat().join(" ")}`, spellcheck: false, autocomplete: "off" });
    this.problem = element("p", { id: `${id}-problem`, class: "field-problem", hidden: true });
    this.root = element(
      "div",
      { class: `form-field ${kind}` },
      element("label", { for: id }, name),
      this.input,
      element("p", { id: `${id}-help`, class: "help" }, help, kind === "switch" ? "" : ` (${expects})`),
      this.problem,
    );
    this.write(undefined);
  }

  get isSet() {
    if (this.kind === "switch") return this.input.checked !== Boolean(this.byDefault);
    return this.input.value.trim() !== "";
  }

  get isWrong() {
    return !this.problem.hidden;
  }

  read() {
    if (this.kind === "switch") return this.input.checked;
    if (this.kind === "list") return this.input.value.split("\n").map((line) => line.trim()).filter(Boolean);
    return this.input.value;
  }

  write(value) {
    if (this.kind === "switch") this.input.checked = value === undefined ? Boolean(this.byDefault) : value === true || value === "true";
    else this.input.value = value === undefined ? "" : [value].flat().join("\n");
  }

  tell(problems) {
    this.problem.textContent = problems.join("\n");
    this.problem.hidden = !problems.length;
    this.input.setAttribute("aria-invalid", String(problems.length > 0));
  }

  answers(words) {
    const text = `${this.name} ${this.help}`.toLowerCase();
    return words.every((word) => text.includes(word));
  }
}
