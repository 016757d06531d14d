// The set as a whole: tags with their counts, and edits of many captions with a preview.
import { button, byId, element, later, plural } from "./dom.js";
import { get, post } from "./server.js";
import { MachineSection } from "./machine.js";
import { telling, toast } from "./toasts.js";
import { showPreview } from "./preview.js";

const SHOWN_TAGS = 200;
const KINDS = [
  ["replace", "Replace"],
  ["add", "Add a tag"],
  ["remove", "Remove a tag"],
  ["move-gl", "Move a tag from G to L"],
  ["move-lg", "Move a tag from L to G"],
];
const READINGS = [
  ["tag", "a whole tag"],
  ["text", "any text"],
  ["pattern", "a regular expression"],
];

export class Panel {
  /** `scope()` is what is shown and selected, `find(query)` asks another question, `changed(news)` follows each edit. */
  constructor({ scope, find, changed, beforeEdit }) {
    Object.assign(this, { scope, find, changed, beforeEdit });
    this.root = byId("panel");
    this.encoder = "l";
    this.build();
    this.lookSoon = later(() => this.look(), 120);
  }

  toggle(isShown = this.root.hidden) {
    this.root.hidden = !isShown;
    byId("toggle-panel").setAttribute("aria-expanded", String(isShown));
    if (isShown) this.look();
  }

  build() {
    this.kind = select(KINDS, () => this.adapt());
    this.reading = select(READINGS);
    this.findField = element("input", { type: "text", autocomplete: "off", spellcheck: false });
    this.byField = element("input", { type: "text", autocomplete: "off", spellcheck: false });
    this.findLabel = element("span", {}, "Find");
    this.inL = element("input", { type: "checkbox", checked: true });
    this.inG = element("input", { type: "checkbox" });
    this.inFront = element("input", { type: "checkbox" });
    this.all = element("input", { type: "radio", name: "scope", checked: true });
    this.some = element("input", { type: "radio", name: "scope" });
    this.numAll = element("span");
    this.numSome = element("span");
    this.readingLabel = field("that is", this.reading);
    this.byLabel = field("by", this.byField);
    this.where = element("fieldset", {}, element("legend", {}, "in"), choice(this.inL, "L"), choice(this.inG, "G"));
    this.front = choice(this.inFront, "in front of the others");
    const form = element(
      "form",
      { onsubmit: (event) => (event.preventDefault(), this.preview()) },
      field("What to do", this.kind),
      element("label", { class: "field" }, this.findLabel, this.findField),
      this.readingLabel,
      this.byLabel,
      this.front,
      this.where,
      element(
        "fieldset",
        {},
        element("legend", {}, "of"),
        choice(this.all, this.numAll),
        choice(this.some, this.numSome),
      ),
      element("button", { class: "main" }, "Show the changes"),
    );
    this.filter = element("input", {
      type: "search",
      placeholder: "tags that begin with",
      "aria-label": "Tags that begin with",
      oninput: () => this.lookSoon(),
    });
    this.letters = ["l", "g"].map((encoder) =>
      button(encoder.toUpperCase(), () => ((this.encoder = encoder), this.look()), { "aria-label": `Tags of ${encoder.toUpperCase()}` }),
    );
    this.machine = new MachineSection({
      scope: () => this.scopeRequest(),
      beforeEdit: () => this.beforeEdit(),
      show: (request) => this.showPlan(request),
    });
    this.tags = element("ul", { class: "tags", "aria-label": "Tags" });
    this.note = element("p", { class: "note" });
    this.root.replaceChildren(
      element("h2", {}, "Change many captions"),
      form,
      this.machine.root,
      element("h2", {}, "Tags"),
      element("div", { class: "tag-tools" }, element("div", { class: "segments", role: "group", "aria-label": "Encoder" }, ...this.letters), this.filter),
      this.tags,
      this.note,
    );
    this.adapt();
  }

  adapt() {
    const kind = this.kind.value;
    const isMove = kind.startsWith("move");
    this.findLabel.textContent = kind === "replace" ? "Find" : "Tag (several: separated as tags are)";
    this.readingLabel.hidden = this.byLabel.hidden = kind !== "replace";
    this.where.hidden = isMove;
    this.front.hidden = kind !== "add" && !isMove;
  }

  showScope() {
    const { numShown, selected } = this.scope();
    this.numAll.textContent = `all ${plural(numShown, "image")} shown`;
    this.numSome.textContent = `${plural(selected.length, "selected image")}`;
    this.some.disabled = !selected.length;
    this.some.checked = selected.length > 0;
    this.all.checked = !this.some.checked;
    if (!this.root.hidden) this.lookSoon();
  }

  async look() {
    const { query } = this.scope();
    this.letters.forEach((each, index) => each.setAttribute("aria-pressed", String("lg"[index] === this.encoder)));
    const { encoder } = this;
    const found = await telling(() => get("/api/tags", { encoder, query, prefix: this.filter.value, limit: SHOWN_TAGS }));
    if (!found || encoder !== this.encoder) return;
    this.tags.replaceChildren(
      ...found.tags.map(([tag, count]) =>
        element(
          "li",
          {},
          button(tag, () => (this.findField.value = tag), { title: "Take it into the form above" }),
          element("span", { class: "num" }, String(count)),
          button("find", () => this.find(`${encoder}:[${tag}]`), { "aria-label": `Find images with ${tag}` }),
        ),
      ),
    );
    const rest = found.num - found.tags.length;
    this.note.textContent = rest > 0 ? `and ${plural(rest, "more tag")}` : found.num ? "" : "no tags";
  }

  request() {
    const kind = this.kind.value;
    const chosen = [this.inL.checked && "l", this.inG.checked && "g"].filter(Boolean);
    const edit = {
      kind: kind.split("-")[0],
      encoders: kind.startsWith("move") ? [...kind.split("-")[1]] : chosen,
      find: this.findField.value,
      by: this.byField.value,
      reading: kind === "replace" ? this.reading.value : "tag",
      in_front: this.inFront.checked,
    };
    return { edit, ...this.scopeRequest() };
  }

  scopeRequest() {
    const { query, selected } = this.scope();
    return this.some.checked ? { ids: selected } : { query };
  }

  async preview() {
    if (await this.beforeEdit()) await this.showPlan(this.request());
  }

  async showPlan(request) {
    const plan = await telling(() => post("/api/edits/preview", request));
    if (!plan) return;
    if (!plan.num) {
      toast(plan.left_out.length ? `Nothing would change. Left out: ${plan.left_out[0]}` : "Nothing would change.");
      return;
    }
    showPreview(plan, {
      more: (offset) => telling(() => post("/api/edits/preview", { ...request, offset })),
      apply: () => telling(() => post("/api/edits/apply", { ...request, plan: plan.plan })),
      done: (outcome) => this.changed(outcome),
    });
  }
}

function select(choices, changed = () => {}) {
  return element("select", { onchange: changed }, ...choices.map(([value, text]) => element("option", { value }, text)));
}

function field(text, control) {
  return element("label", { class: "field" }, element("span", {}, text), control);
}

function choice(control, text) {
  return element("label", { class: "choice" }, control, text);
}
