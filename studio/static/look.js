// The samples of one run or several: a row for each prompt, one slider for all of them.
import { showPicture } from "./about_picture.js";
import { Compare } from "./compare.js";
import { button, element } from "./dom.js";
import { PictureStore } from "./picture_store.js";
import { get } from "./server.js";

const EDGE = 320;
const STEPS_AHEAD = 16; // half a second of stepping
const STEPS_BEHIND = 4;
const PLAYED_MS = 100;
const BRIGHTER = 2; // doublings of a difference

export class Look {
  constructor() {
    this.place = 0;
    this.steps = [];
    this.rows = [];
    this.store = new PictureStore(() => this.drawSoon());
    this.output = element("output", { id: "shown-step" });
    this.slider = element("input", { type: "range", id: "step", min: 0, value: 0, "aria-label": "Step", oninput: () => this.go(Number(this.slider.value)) });
    this.playButton = button("Play", () => this.play(), { "aria-pressed": "false", title: "Space" });
    this.difference = element("input", { type: "checkbox", onchange: () => this.drawSoon() });
    this.modes = ["Samples", "L × G"].map((name) => button(name, () => this.choose(name), { "aria-pressed": "false" }));
    this.modeBox = element("div", { class: "segments", role: "group", "aria-label": "Which images" }, ...this.modes);
    this.mode = "Samples";
    this.note = element("p", { class: "soft" });
    this.grid = element("div", { class: "samples" });
    this.compare = new Compare({ closed: () => this.showGrid() });
    this.tools = element(
      "div",
      { class: "look-tools" },
      element("label", { class: "stepper" }, "step ", this.output, this.slider),
      this.playButton,
      element("label", { class: "choice" }, this.difference, "difference to the first step"),
      this.modeBox,
    );
    this.root = element("div", { class: "look" }, this.tools, this.note, this.grid, this.compare.root);
  }

  async show(runs) {
    const said = JSON.stringify(runs.map((run) => [run.id, run.num_samples]));
    if (said === this.said) return;
    this.said = said;
    this.runs = runs;
    this.found = await Promise.all(runs.map((run) => get(`/api/runs/${run.id}/samples`).catch((error) => ({ rows: [], steps: [], grids: {}, left_out: [], problem: error.message }))));
    const notes = this.found.flatMap(({ problem, left_out: leftOut }) => [
      problem ?? "",
      leftOut.length ? `${leftOut.length} files cannot be read, or do not say how they were drawn, and are left out: ${leftOut.slice(0, 5).join(", ")}` : "",
    ]);
    const hasGrids = this.found.some(({ grids }) => Object.keys(grids).length);
    this.modeBox.hidden = !hasGrids;
    this.note.textContent = [...notes, this.found.some(({ rows }) => rows.length) ? "" : "No samples yet: --sample_prompts asks for them."].filter(Boolean).join(" ");
    this.build();
  }

  choose(mode) {
    this.mode = mode;
    this.build();
  }

  build() {
    this.modes.forEach((each) => each.setAttribute("aria-pressed", String(each.textContent === this.mode)));
    const wasLast = this.place >= this.steps.length - 1;
    const step = this.steps[this.place];
    const rows = new Map();
    const steps = new Set();
    this.found.forEach((found, run) => {
      const own = this.mode === "Samples" ? found.rows : [{ l: "each", g: "each", index: "", details: "", images: found.grids }];
      for (const row of own) {
        const key = [row.index, row.l, row.g, row.details, row.is_average].join("\n");
        if (!rows.has(key)) rows.set(key, { ...row, of: this.runs.map(() => null) });
        rows.get(key).of[run] = { images: row.images, steps: Object.keys(row.images).map(Number).sort((a, b) => a - b) };
        for (const each of Object.keys(row.images)) steps.add(Number(each));
      }
    });
    this.steps = [...steps].sort((a, b) => a - b);
    this.rows = [...rows.values()];
    this.cells = [];
    this.grid.replaceChildren(...this.rows.map((row, index) => this.row(row, index)));
    this.slider.max = Math.max(0, this.steps.length - 1);
    this.slider.disabled = this.steps.length < 2;
    this.place = wasLast || step === undefined ? this.steps.length - 1 : Math.max(0, this.steps.indexOf(step));
    this.go(this.place);
  }

  row(row, index) {
    const pictures = row.of.map((own, run) => {
      if (!own) return element("div", { class: "picture none" }, "not in this run");
      const canvas = element("canvas", { width: EDGE, height: EDGE, role: "img" });
      const under = element("span", { class: "under" });
      const open = element("button", { type: "button", class: "picture", title: "Compare two steps", onclick: () => this.openCompare(index, run) }, canvas);
      const cell = { row: index, run, canvas, under, open, ...own, drawn: null };
      this.cells.push(cell);
      const about = button("i", () => showPicture(this.runs[run].id, this.at(cell)?.id), { class: "about", "aria-label": "Prompts and settings" });
      const name = this.runs.length > 1 ? element("span", { class: "of-run" }, this.runs[run].name || this.runs[run].record) : null;
      return element("div", { class: "cell-of-run" }, name, open, element("div", { class: "below" }, under, about));
    });
    const texts =
      this.mode === "Samples"
        ? [
            row.is_average ? element("span", { class: "soft" }, "moving average") : null,
            element("span", { class: "l" }, element("b", {}, "L "), row.l),
            element("span", { class: "g" }, element("b", {}, "G "), row.g),
          ]
        : [element("span", {}, "each L prompt with each G prompt")];
    return element("figure", { class: this.mode === "Samples" ? "sample" : "sample wide" }, element("div", { class: "pictures" }, ...pictures), element("figcaption", {}, ...texts));
  }

  /** Return the image of a cell at the step that is shown, or at the last one before it. */
  at(cell, step = this.steps[this.place]) {
    if (step in cell.images) return { step, id: cell.images[step] };
    const own = cell.steps.findLast((each) => each <= step) ?? (this.runs.length > 1 ? undefined : cell.steps[0]);
    return own === undefined ? null : { step: own, id: cell.images[own] };
  }

  address(cell, image, edge = this.mode === "Samples" ? EDGE : 640) {
    return `/runs/${this.runs[cell.run].id}/samples/${image.id}?edge=${edge}&v=1`;
  }

  go(place) {
    this.direction = place < this.place ? -1 : 1;
    this.place = Math.min(Math.max(0, place), this.steps.length - 1);
    this.slider.value = this.place;
    const step = this.steps[this.place];
    this.output.textContent = step === undefined ? "–" : step.toLocaleString("en");
    this.slider.setAttribute("aria-valuetext", `step ${step}`);
    this.drawSoon();
  }

  drawSoon() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
      if (this.wantedAt !== this.place || this.wantedOf !== this.cells) this.wantNear();
    });
  }

  draw() {
    for (const cell of this.cells) {
      const image = this.at(cell);
      const address = image && this.address(cell, image);
      const bitmap = address && this.store.get(address);
      const first = this.difference.checked ? this.store.get(this.address(cell, { id: cell.images[cell.steps[0]] })) : null;
      const said = `${address} ${Boolean(bitmap)} ${this.difference.checked} ${Boolean(first)}`;
      if (said === cell.drawn) continue;
      cell.drawn = said;
      const isMissing = address && this.store.isMissing(address);
      cell.under.textContent = !image ? "not yet" : isMissing ? `step ${image.step}: cannot be read` : `step ${image.step}`;
      cell.canvas.setAttribute("aria-label", `${this.rows[cell.row].g}, ${cell.under.textContent}`);
      cell.open.classList.toggle("waiting", Boolean(image) && !bitmap && !isMissing);
      if (bitmap) paint(cell.canvas, bitmap, first);
      else if (!image || isMissing) cell.canvas.getContext("2d").clearRect(0, 0, cell.canvas.width, cell.canvas.height);
    }
  }

  wantNear() {
    this.wantedAt = this.place;
    this.wantedOf = this.cells;
    const firsts = this.cells.filter((cell) => cell.steps.length).map((cell) => this.address(cell, { id: cell.images[cell.steps[0]] }));
    const ahead = [...this.addresses(this.place, this.direction, 1, STEPS_AHEAD)];
    const behind = [...this.addresses(this.place, -this.direction, 1, STEPS_BEHIND)];
    this.store.want([...this.addresses(this.place, 1, 0, 0), ...firsts, ...ahead, ...behind], this.far(this.place, this.direction));
  }

  /** Return the addresses of the images that are `from` to `to` places away in a direction. */
  *addresses(place, direction, from, to) {
    for (let away = from; away <= to; away += 1) {
      const step = this.steps[place + direction * away];
      if (step === undefined) return;
      for (const cell of this.cells) {
        const image = this.at(cell, step);
        if (image) yield this.address(cell, image);
      }
    }
  }

  /** Return the addresses of all images that are further away, as they are asked for: each step would take them all. */
  *far(place, direction) {
    for (let away = STEPS_BEHIND + 1; away < this.steps.length; away += 1) {
      if (away > STEPS_AHEAD) yield* this.addresses(place, direction, away, away);
      yield* this.addresses(place, -direction, away, away);
    }
  }

  play() {
    const isPlaying = this.playButton.getAttribute("aria-pressed") === "true";
    this.playButton.setAttribute("aria-pressed", String(!isPlaying));
    clearInterval(this.playing);
    if (isPlaying) return;
    if (this.place >= this.steps.length - 1) this.go(0);
    this.playing = setInterval(() => (this.place >= this.steps.length - 1 ? this.play() : this.go(this.place + 1)), PLAYED_MS);
  }

  openCompare(row, run) {
    const sides = this.cells.filter((cell) => cell.row === row).flatMap((cell) =>
      cell.steps.map((step) => ({
        label: this.runs.length > 1 ? `${this.runs[cell.run].name || this.runs[cell.run].record}, step ${step}` : `step ${step}`,
        step,
        run: cell.run,
        address: `/runs/${this.runs[cell.run].id}/samples/${cell.images[step]}`,
      })),
    );
    const step = this.at(this.cells.find((cell) => cell.row === row && cell.run === run)).step;
    const now = sides.findIndex((side) => side.run === run && side.step === step);
    const other = sides.findIndex((side) => side.run !== run && side.step === step);
    this.tools.hidden = this.grid.hidden = this.note.hidden = true;
    const { l, g } = this.rows[row];
    this.compare.open(sides, other >= 0 ? other : sides.findIndex((side) => side.run === run), now, this.mode === "Samples" ? `L: ${l}  G: ${g}` : "each L prompt with each G prompt");
  }

  showGrid() {
    this.tools.hidden = this.grid.hidden = this.note.hidden = false;
    this.grid.querySelector("button")?.focus();
  }

  pressed(event) {
    if (this.compare.isOpen) return this.compare.pressed(event);
    if (event.altKey || event.ctrlKey || event.metaKey) return false;
    const steps = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    if (event.key in steps) this.go(Math.min(Math.max(0, this.place + steps[event.key]), this.steps.length - 1));
    else if (event.key === " " && event.target.tagName !== "BUTTON") this.play();
    else if (event.key === "d") this.difference.click();
    else return false;
    return true;
  }

  close() {
    clearInterval(this.playing);
    this.store.close();
  }
}

/** Draw an image, or how it differs from another, brighter. */
function paint(canvas, bitmap, first) {
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    canvas.width = bitmap.width;
    canvas.height = bitmap.height;
  }
  const paper = canvas.getContext("2d");
  paper.globalCompositeOperation = "source-over";
  paper.drawImage(bitmap, 0, 0);
  if (!first) return;
  paper.globalCompositeOperation = "difference";
  paper.drawImage(first, 0, 0, canvas.width, canvas.height);
  paper.globalCompositeOperation = "lighter";
  for (let time = 0; time < BRIGHTER; time += 1) paper.drawImage(canvas, 0, 0);
}
