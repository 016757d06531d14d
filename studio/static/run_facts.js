// What a run was told and what it left, and what it has printed.
import { element } from "./dom.js";
import { get } from "./server.js";

/** Return options, set, starts and files of a run. */
export function aboutRun(run) {
  const options = Object.entries(run.options).map(([name, value]) => [`--${name}`, [value].flat().join(" ")]);
  const set = [
    ...Object.entries(run.set).map(([name, count]) => [name.replaceAll("_", " "), String(count)]),
    ...Object.entries(run.captions).map(([encoder, source]) => [`captions ${encoder.toUpperCase()}`, source]),
    ["seed", String(run.seed ?? "")],
  ];
  const starts = run.starts.map(({ time, step }) => [time.replace("T", " "), step ? `resumed at step ${step}` : "began"]);
  if (run.ended) starts.push([run.ended.replace("T", " "), run.state]);
  const files = run.files.map(({ name, mib }) => [name, mib >= 1024 ? `${(mib / 1024).toFixed(2)} GiB` : `${mib.toFixed(1)} MiB`]);
  return element(
    "div",
    { class: "facts" },
    table("Options that differ from their defaults", options),
    table("The set", set),
    table("Starts", starts),
    table("Files", files),
  );
}

function table(title, rows) {
  const lines = rows.map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value)));
  const body = lines.length ? element("table", {}, element("tbody", {}, ...lines)) : element("p", { class: "soft" }, "none");
  return element("section", {}, element("h3", {}, title), body);
}

/** The last lines of the log of one run, which follows what is printed unless one has scrolled back. */
export class RunLog {
  constructor() {
    this.text = element("pre", { class: "log", tabIndex: 0, "aria-label": "Log", role: "log" });
    this.root = element("div", {}, this.text);
    this.size = -1;
  }

  async show([run]) {
    if (!run) return;
    const found = await get(`/api/runs/${run.id}/log`).catch((error) => ({ lines: [error.message], size: -2 }));
    if (found.size === this.size) return;
    this.size = found.size;
    const { scrollTop, clientHeight, scrollHeight } = this.text;
    const follows = scrollTop + clientHeight > scrollHeight - 40;
    const before = found.is_whole === false ? ["(earlier lines are in the file)"] : [];
    this.text.textContent = [...before, ...found.lines].join("\n");
    if (follows) this.text.scrollTop = this.text.scrollHeight;
  }
}
