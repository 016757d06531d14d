// The caption of one encoder: its variants, three ways to write it, its tokens, and whether it is saved.
import { button, element } from "./dom.js";
import { Chips } from "./chips.js";
import { Saving } from "./saving.js";
import { Writing } from "./writing.js";

const TAGS = "Tags";
const TEXT = "Text";
const RAW = "Raw";
const STATES = { saved: "saved", waiting: "…", away: "not saved: no answer", failed: "not saved", conflict: "not saved" };

export class Card {
  /** `typed()` is called when the text changes, `written(answer)` when it has been saved. */
  constructor(encoder, { typed, written }) {
    Object.assign(this, { encoder, typed, written });
    const letter = encoder.toUpperCase();
    this.chips = new Chips(encoder, `Tags of ${letter}`, { changed: (text) => this.changed(text) });
    this.writing = new Writing(`Caption of ${letter}`, { changed: (text) => this.changed(text) });
    this.raw = element("textarea", {
      class: "raw",
      "aria-label": `All lines of ${letter}`,
      spellcheck: false,
      oninput: () => this.changedRaw(),
    });
    this.where = element("span", { class: "where" });
    this.state = element("span", { class: "saved", "data-state": "saved" });
    this.modes = [TAGS, TEXT, RAW].map((mode) => button(mode, () => this.setMode(mode, { isChosen: true })));
    this.tabs = element("div", { role: "tablist", "aria-label": `Variants of ${letter}` });
    this.variantTools = element("div", { class: "variants" }, this.tabs);
    this.body = element("div", { class: "body" });
    this.conflict = element("div", { class: "conflict", role: "alert", hidden: true });
    this.meterText = element("p");
    this.meterBar = element("i");
    this.meter = element("div", { class: "meter" }, element("div", { class: "track" }, this.meterBar), this.meterText);
    this.notes = element("div");
    this.root = element(
      "section",
      { class: `card ${encoder}`, "aria-label": `${letter} caption` },
      element("header", {}, element("h3", {}, letter), this.where, this.state),
      element(
        "div",
        { class: "tools" },
        element("div", { class: "segments", role: "group", "aria-label": `How to write ${letter}` }, ...this.modes),
        this.variantTools,
      ),
      this.conflict,
      this.body,
      this.meter,
      this.notes,
    );
  }

  /** Show a caption of an image. */
  open(id, caption) {
    this.commit(); // what was typed while this image was on its way belongs to the one before
    this.id = id;
    this.variant = 0;
    this.count = null;
    this.saving = new Saving(id, this.encoder, caption.tag, {
      told: (state, detail) => this.tell(state, detail),
      written: (answer, isLatest) => this.wrote(answer, isLatest),
    });
    this.take(caption);
    this.tell("saved");
    const remembered = localStorage.getItem(`mode-${this.encoder}`);
    this.setMode(remembered ?? (caption.is_prose || caption.problem ? TEXT : TAGS));
  }

  /** Show another version of the same caption. */
  take(caption) {
    this.caption = caption;
    this.saving.tag = caption.tag;
    this.variant = Math.min(this.variant, caption.variants.length - 1);
    this.where.textContent = caption.exists ? caption.where : `${caption.where} (new)`;
    this.where.title = caption.where;
    this.conflict.hidden = true;
    this.showVariants();
    this.showText();
  }

  get text() {
    return this.caption.variants[this.variant] ?? "";
  }

  showVariants() {
    const { variants, problem, uses_all: usesAll } = this.caption;
    const shown = JSON.stringify([variants.length, this.variant, Boolean(problem), usesAll]);
    if (shown === this.shownVariants) return; // a save must not take a button away from under the pointer
    this.shownVariants = shown;
    const tabs = variants.map((_, index) =>
      button(String(index + 1), () => this.choose(index), {
        role: "tab",
        "aria-selected": String(index === this.variant),
        "aria-label": `Variant ${index + 1}${index && !usesAll ? ", not in use without wildcards" : ""}`,
        tabIndex: index === this.variant ? 0 : -1,
        onkeydown: (event) => {
          const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
          if (!step || event.altKey) return;
          event.preventDefault();
          this.choose((index + step + variants.length) % variants.length);
          this.tabs.children[this.variant].focus();
        },
      }),
    );
    this.tabs.replaceChildren(...tabs);
    const tools = [button("+", () => this.add(), { "aria-label": "Add a variant", title: "Add a variant" })];
    if (variants.length > 1) {
      tools.push(button("−", () => this.remove(), { "aria-label": "Remove this variant", title: "Remove this variant" }));
    }
    this.tabs.hidden = variants.length < 2;
    this.variantTools.replaceChildren(this.tabs, ...(problem ? [] : tools));
  }

  showText() {
    const { problem, text, separator } = this.caption;
    if (problem) {
      this.body.replaceChildren(element("p", { class: "note" }, problem));
      return;
    }
    this.chips.show(this.text, separator);
    this.writing.show(this.text);
    if (this.raw.value !== text) this.raw.value = text;
    const shown = { [TAGS]: this.chips.root, [TEXT]: this.writing.root, [RAW]: this.raw }[this.mode ?? TEXT];
    if (this.body.firstChild !== shown) this.body.replaceChildren(shown);
  }

  setMode(mode, { isChosen = false } = {}) {
    this.mode = mode;
    if (isChosen) localStorage.setItem(`mode-${this.encoder}`, mode);
    this.modes.forEach((each) => each.setAttribute("aria-pressed", String(each.textContent === mode)));
    this.showText();
    this.mark(this.count);
    if (isChosen) this.focus();
  }

  nextMode() {
    const modes = [TAGS, TEXT, RAW];
    this.setMode(modes[(modes.indexOf(this.mode) + 1) % modes.length], { isChosen: true });
  }

  async choose(index) {
    await this.flush();
    this.variant = index;
    this.showVariants();
    this.showText();
    this.typed();
  }

  async add() {
    await this.flush();
    this.saving.change({ add: this.text });
    if (!(await this.saving.flush())) return;
    this.variant = this.caption.variants.length - 1;
    this.take(this.caption);
    this.typed();
    this.focus();
  }

  async remove() {
    await this.flush();
    this.saving.change({ remove: this.variant });
    if (await this.saving.flush()) this.typed();
  }

  /** Write what is not saved yet; the promise is true when all is. */
  flush(settings) {
    this.commit();
    return this.saving?.flush(settings) ?? true;
  }

  /** Take what stands in a field for a tag and is not part of the caption yet. */
  commit() {
    if (this.saving && this.mode === TAGS) this.chips.commit();
  }

  /** Take another text for the variant that is shown, as if it had been typed. */
  changed(text) {
    if (text === this.text) return;
    this.caption.variants[this.variant] = text;
    this.saving.change({ variant: this.variant, text });
    if (this.mode === TEXT) this.writing.show(text);
    this.typed();
  }

  replace(text) {
    this.changed(text);
    this.showText();
  }

  changedRaw() {
    this.saving.change({ raw: this.raw.value });
    this.caption.variants = this.raw.value.split("\n").filter((line) => line.trim());
    if (!this.caption.variants.length) this.caption.variants = [""];
    this.variant = 0;
    this.typed();
  }

  wrote(answer, isLatest) {
    if (isLatest) {
      this.caption = answer.caption;
      this.variant = Math.min(this.variant, this.caption.variants.length - 1);
      this.where.textContent = this.caption.where;
      this.showVariants();
      if (this.mode !== RAW) this.raw.value = this.caption.text;
    }
    this.written(answer);
  }

  tell(state, detail) {
    this.state.dataset.state = state;
    this.state.textContent = STATES[state];
    this.state.title = typeof detail === "string" ? detail : "";
    this.conflict.hidden = state !== "conflict" && state !== "failed";
    if (state === "conflict") this.showConflict(detail);
    if (state === "failed") {
      this.conflict.replaceChildren(
        element("p", {}, detail),
        element("div", { class: "actions" }, button("Try again", () => this.saving.flush())),
      );
    }
  }

  showConflict(now) {
    this.conflict.replaceChildren(
      element("p", {}, "This caption has changed meanwhile, in another tab or by another program. It is now:"),
      element("p", {}, element("b", {}, now.problem ?? (now.text.trim() || "empty"))),
      element(
        "div",
        { class: "actions" },
        button("Keep mine", () => this.keepMine(now), { title: "Undo brings the other one back" }),
        button("Take theirs", () => this.takeTheirs(now)),
      ),
    );
  }

  keepMine(now) {
    this.commit();
    this.saving.keepMine(now.tag, { variant: this.variant, text: this.text });
  }

  takeTheirs(now) {
    this.saving.takeTheirs(now.tag);
    this.take(now);
    this.typed();
  }

  /** Take in that the caption on the disk may be another one. */
  seen(caption) {
    if (caption.tag === this.saving.tag) return;
    if (this.saving.isDirty || (this.mode === TAGS && this.chips.isEditing)) {
      this.saving.isInConflict = true;
      this.tell("conflict", caption);
    } else {
      this.take(caption);
      this.typed();
    }
  }

  /** Show how the encoder reads the text. */
  mark(count) {
    this.count = count;
    if (!count) return;
    this.writing.mark(count);
    this.chips.mark(count);
    if (count.problem) {
      this.meterText.textContent = count.problem;
      this.notes.replaceChildren();
      return;
    }
    const { num_tokens: used, limit, cut, final, cleaned } = count;
    this.meter.classList.toggle("over", used > limit);
    this.meterBar.style.width = `${Math.min(100, (100 * used) / limit)}%`;
    this.meterText.replaceChildren(
      element("strong", {}, `${used} / ${limit}`),
      used > limit ? ` tokens; not read: ${cut.trim()}` : " tokens",
    );
    const notes = [];
    if (final !== null) notes.push(note("With prefix, suffix and first choices:", final));
    if (cleaned !== null) notes.push(note("Cleaned before it is read:", cleaned));
    this.notes.replaceChildren(...notes);
  }

  focus() {
    if (this.caption.problem) return;
    if (this.mode === TAGS) this.chips.focus();
    else if (this.mode === TEXT) this.writing.focus();
    else this.raw.focus();
  }
}

function note(title, text) {
  return element("p", { class: "note" }, element("b", {}, `${title} `), text);
}
