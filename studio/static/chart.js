// Curves over steps on a canvas: a stretch is chosen by dragging or by keys, and the values under the pointer are shown.
import { element } from "./dom.js";

const LEFT = 58;
const RIGHT = 10;
const TOP = 14;
const BOTTOM = 22;
const TICKS = 4;
const LEAST_DRAG = 6;
const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]];

export class Chart {
  /** `zoomed(first, last)` is called with the steps of the stretch that was chosen, nulls for all. */
  constructor(title, { zoomed }) {
    Object.assign(this, { title, zoomed });
    this.canvas = element("canvas", { role: "img", tabIndex: 0, "aria-label": title });
    this.legend = element("ul", { class: "legend" });
    this.tip = element("div", { class: "tip", hidden: true });
    this.root = element("figure", { class: "chart" }, element("figcaption", {}, title), this.canvas, this.tip, this.legend);
    this.series = [];
    this.marks = [];
    this.range = [null, null];
    this.canvas.addEventListener("pointerdown", (event) => this.began(event));
    this.canvas.addEventListener("pointermove", (event) => this.moved(event));
    this.canvas.addEventListener("pointerup", (event) => this.ended(event));
    this.canvas.addEventListener("pointerleave", () => (this.tip.hidden = true));
    this.canvas.addEventListener("dblclick", () => this.zoomed(null, null));
    this.canvas.addEventListener("wheel", (event) => event.ctrlKey && this.wheel(event), { passive: false });
    this.canvas.addEventListener("keydown", (event) => this.pressed(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  show(series, marks, range) {
    Object.assign(this, { series, marks, range });
    this.legend.replaceChildren(
      ...series.map(({ label, colour, values }) => {
        const swatch = element("i");
        swatch.style.background = colour;
        const last = values.findLast((value) => value !== null);
        return element("li", {}, swatch, `${label} `, element("strong", {}, last === undefined ? "–" : short(last)));
      }),
    );
    const said = series.map(({ label, values }) => `${label} ${short(values.findLast((value) => value !== null) ?? NaN)}`);
    this.canvas.setAttribute("aria-label", `${this.title} over steps: ${said.join(", ")}`);
    this.draw();
  }

  scales() {
    const ends = this.series.filter(({ steps }) => steps.length).map(({ steps }) => [steps[0], steps.at(-1)]);
    let first = this.range[0] ?? Math.min(...ends.map(([start]) => start));
    let last = this.range[1] ?? Math.max(...ends.map(([, end]) => end));
    if (!Number.isFinite(first)) [first, last] = [0, 1];
    if (last <= first) last = first + 1;
    let [low, high] = [Infinity, -Infinity];
    for (const { steps, values, error } of this.series) {
      values.forEach((value, place) => {
        if (value === null || steps[place] < first || steps[place] > last) return;
        const about = error?.values[place] ?? 0;
        low = Math.min(low, value - about);
        high = Math.max(high, value + about);
      });
    }
    if (low > high) [low, high] = [0, 1];
    if (low > 0 && low < high / 2) low = 0;
    if (high === low) high = low + (Math.abs(low) || 1);
    return { first, last, low, high };
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width) return;
    const ratio = devicePixelRatio;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    const paper = this.canvas.getContext("2d");
    paper.scale(ratio, ratio);
    const { first, last, low, high } = (this.scale = this.scales());
    const style = getComputedStyle(document.documentElement);
    const [soft, line] = ["--soft", "--line"].map((name) => style.getPropertyValue(name));
    this.x = (step) => LEFT + ((step - first) / (last - first)) * (width - LEFT - RIGHT);
    const y = (value) => height - BOTTOM - ((value - low) / (high - low)) * (height - TOP - BOTTOM);
    paper.font = "11px system-ui, sans-serif";
    paper.fillStyle = soft;
    paper.strokeStyle = line;
    for (let tick = 0; tick <= TICKS; tick += 1) {
      const value = low + ((high - low) * tick) / TICKS;
      paper.beginPath();
      paper.moveTo(LEFT, y(value));
      paper.lineTo(width - RIGHT, y(value));
      paper.stroke();
      paper.textAlign = "right";
      paper.fillText(short(value), LEFT - 6, y(value) + 4);
      paper.textAlign = tick === TICKS ? "right" : "center";
      paper.fillText(Math.round(first + ((last - first) * tick) / TICKS).toLocaleString("en"), this.x(first + ((last - first) * tick) / TICKS), height - 6);
    }
    this.drawMarks(paper, height, soft);
    paper.save();
    paper.beginPath();
    paper.rect(LEFT, 0, width - LEFT - RIGHT, height - BOTTOM + 1);
    paper.clip();
    for (const each of this.series) this.drawSeries(paper, each, y);
    paper.restore();
    if (this.drag) {
      paper.fillStyle = "rgb(91 63 214 / 18%)";
      paper.fillRect(Math.min(...this.drag), TOP, Math.abs(this.drag[1] - this.drag[0]), height - TOP - BOTTOM);
    }
  }

  drawMarks(paper, height, colour) {
    paper.textAlign = "center";
    const taken = [];
    for (const { step, sign } of this.marks) {
      if (step < this.scale.first || step > this.scale.last) continue;
      const x = this.x(step);
      if (taken.some((other) => Math.abs(other - x) < 3)) continue; // closer than can be seen
      taken.push(x);
      paper.strokeStyle = colour;
      paper.globalAlpha = 0.45;
      paper.setLineDash([2, 3]);
      paper.beginPath();
      paper.moveTo(x, TOP);
      paper.lineTo(x, height - BOTTOM);
      paper.stroke();
      paper.setLineDash([]);
      paper.globalAlpha = 1;
      paper.fillStyle = colour;
      paper.fillText(sign, x, TOP - 3);
    }
  }

  drawSeries(paper, { steps, values, colour, dash, error }, y) {
    if (error) {
      paper.fillStyle = colour;
      paper.globalAlpha = 0.15;
      paper.beginPath();
      steps.forEach((step, place) => paper.lineTo(this.x(step), y(values[place] + (error.values[place] ?? 0))));
      [...steps.keys()].reverse().forEach((place) => paper.lineTo(this.x(steps[place]), y(values[place] - (error.values[place] ?? 0))));
      paper.fill();
      paper.globalAlpha = 1;
    }
    paper.strokeStyle = colour;
    paper.lineWidth = 1.5;
    paper.setLineDash(DASHES[dash]);
    paper.beginPath();
    let isDown = false;
    steps.forEach((step, place) => {
      if (values[place] === null) return (isDown = false);
      if (isDown) paper.lineTo(this.x(step), y(values[place]));
      else paper.moveTo(this.x(step), y(values[place]));
      return (isDown = true);
    });
    paper.stroke();
    paper.setLineDash([]);
    if (steps.length === 1 && values[0] !== null) paper.strokeRect(this.x(steps[0]) - 2, y(values[0]) - 2, 4, 4);
    paper.lineWidth = 1;
  }

  stepAt(x) {
    const { first, last } = this.scale;
    return first + ((x - LEFT) / (this.canvas.clientWidth - LEFT - RIGHT)) * (last - first);
  }

  began(event) {
    this.drag = [event.offsetX, event.offsetX];
    this.canvas.setPointerCapture(event.pointerId);
  }

  moved(event) {
    if (this.drag) {
      this.drag[1] = event.offsetX;
      this.draw();
    }
    const step = this.stepAt(event.offsetX);
    const near = this.marks.filter((mark) => Math.abs(this.x(mark.step) - event.offsetX) < 5).slice(0, 4);
    const lines = this.series.filter(({ steps }) => steps.length).map(({ label, steps, values }) => {
      const place = nearest(steps, step);
      return `${label}  ${values[place] === null ? "not finite" : short(values[place])}  (step ${steps[place]})`;
    });
    this.tip.textContent = [...lines, ...near.map((mark) => `step ${mark.step}: ${mark.kind}`)].join("\n");
    this.tip.hidden = !lines.length;
    const isRight = event.offsetX > this.canvas.clientWidth / 2;
    this.tip.style.left = isRight ? "auto" : `${event.offsetX + 24}px`;
    this.tip.style.right = isRight ? `${this.canvas.clientWidth - event.offsetX + 24}px` : "auto";
  }

  ended() {
    const [one, other] = this.drag ?? [0, 0];
    this.drag = null;
    if (Math.abs(one - other) < LEAST_DRAG) return this.draw();
    const steps = [one, other].map((x) => this.stepAt(x)).sort((a, b) => a - b);
    return this.zoomed(Math.max(0, steps[0]), Math.max(1, steps[1]));
  }

  wheel(event) {
    event.preventDefault();
    this.zoomAround(this.stepAt(event.offsetX), event.deltaY < 0 ? 0.7 : 1 / 0.7);
  }

  zoomAround(step, factor) {
    const { first, last } = this.scale;
    this.zoomed(Math.max(0, step - (step - first) * factor), Math.max(1, step + (last - step) * factor));
  }

  pressed(event) {
    const { first, last } = this.scale ?? { first: 0, last: 1 };
    const width = last - first;
    if (event.key === "+" || event.key === "=") this.zoomAround(first + width / 2, 0.5);
    else if (event.key === "-") this.zoomAround(first + width / 2, 2);
    else if (event.key === "0") this.zoomed(null, null);
    else if (event.key === "ArrowLeft") this.zoomed(Math.max(0, first - width / 4), Math.max(width, last - width / 4));
    else if (event.key === "ArrowRight") this.zoomed(first + width / 4, last + width / 4);
    else return;
    event.preventDefault();
  }
}

/** Return the place of the step that is nearest. */
function nearest(steps, step) {
  let [low, high] = [0, steps.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle;
    else high = middle;
  }
  return step - steps[low] < steps[high] - step ? low : high;
}

function short(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}
