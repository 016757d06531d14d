// Progress and curves of one run or several, read again as they grow.
import { Chart } from "./chart.js";
import { button, element } from "./dom.js";
import { duration } from "./run_list.js";
import { get } from "./server.js";

const POINTS = 900;
const COLOURS = ["#2d7dd2", "#d9822b", "#3a9b5c", "#c0392b", "#7b5ea7", "#6b7688", "#c2498f", "#12908e"];
const MARKS = { "not finite": "✕ loss not finite", spike: "▲ spike of the gradient", resumed: "↻ resumed", saved: "▪ saved", samples: "● samples" }; // the first of several at a place is shown
const ERROR = "/standard_error";

export class RunWatch {
  constructor() {
    this.progress = element("div");
    this.charts = element("div", { class: "charts" });
    this.byTitle = new Map();
    this.range = [null, null];
    this.whole = button("Whole run", () => this.zoom(null, null), { disabled: true });
    this.keys = element("ul", { class: "mark-keys", "aria-label": "Marks" });
    this.hint = element("p", { class: "soft" });
    this.root = element(
      "div",
      {},
      this.progress,
      element("div", { class: "chart-tools" }, this.whole, this.keys),
      this.hint,
      this.charts,
    );
    this.said = "";
  }

  async show(runs) {
    this.runs = runs;
    this.progress.replaceChildren(...runs.map(progressOf));
    const kinds = Object.keys(MARKS).filter((kind) => runs.some((run) => run.marks[kind]?.length));
    this.keys.replaceChildren(...kinds.map((kind) => element("li", {}, MARKS[kind])));
    const titles = [...new Set(runs.flatMap((run) => run.charts.map(({ title }) => title)))];
    this.hint.hidden = titles.length > 0;
    this.hint.textContent = runs.some((run) => run.state === "starts") ? "The run starts …" : "There are no curves yet.";
    await this.read(titles);
  }

  async read(titles) {
    const said = JSON.stringify([titles, this.range, this.runs.map((run) => [run.id, run.step, run.state, run.marks])]);
    if (said === this.said) return;
    this.said = said;
    const [first, last] = this.range;
    const found = await Promise.all(
      this.runs.map(async (run) => {
        const names = run.charts.flatMap((chart) => chart.names);
        if (!names.length) return {};
        const query = new URLSearchParams({ points: POINTS });
        for (const name of [...names, ...names.map((each) => each + ERROR).filter((each) => run.errors.includes(each))]) query.append("name", name);
        if (first !== null) query.set("first", Math.max(0, Math.floor(first)));
        if (last !== null) query.set("last", Math.max(0, Math.ceil(last)));
        return (await get(`/api/runs/${run.id}/curves?${query}`).catch(() => ({ curves: {} }))).curves;
      }),
    );
    for (const title of titles) this.chart(title).show(this.series(title, found), this.marks(), this.range);
    for (const [title, chart] of this.byTitle) if (!titles.includes(title)) chart.root.remove();
  }

  chart(title) {
    if (!this.byTitle.has(title)) {
      const chart = new Chart(title, { zoomed: (first, last) => this.zoom(first, last) });
      this.byTitle.set(title, chart);
      this.charts.append(chart.root);
    }
    return this.byTitle.get(title);
  }

  series(title, found) {
    const made = [];
    this.runs.forEach((run, place) => {
      const names = run.charts.find((chart) => chart.title === title)?.names ?? [];
      for (const name of names) {
        if (!found[place][name]) continue;
        const label = this.runs.length > 1 ? `${run.name || run.record}: ${name}` : name;
        const colour = COLOURS[made.length % COLOURS.length];
        made.push({ label, colour, dash: place % 4, ...found[place][name], error: found[place][name + ERROR] });
      }
    });
    return made;
  }

  marks() {
    if (this.runs.length > 1) return [];
    const { marks } = this.runs[0];
    return Object.keys(MARKS).flatMap((kind) => (marks[kind] ?? []).map((step) => ({ kind, step, sign: MARKS[kind].split(" ")[0] })));
  }

  zoom(first, last) {
    this.range = [first, last];
    this.whole.disabled = first === null;
    if (this.runs) this.read([...this.byTitle.keys()]);
  }
}

function progressOf(run) {
  const steps = run.num_steps ? `step ${(run.step ?? 0).toLocaleString("en")} of ${run.num_steps.toLocaleString("en")}` : run.state;
  const left = run.seconds_left ? `, about ${duration(run.seconds_left)} left` : "";
  return element(
    "div",
    { class: "progress" },
    element("progress", { max: run.num_steps || 1, value: run.step ?? 0, "aria-label": `Progress of ${run.name || run.record}` }),
    element("span", {}, `${steps}${left}`),
  );
}
