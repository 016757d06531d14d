// All runs, the newest first: one is opened by its name, several are chosen to be seen side by side.
import { button, element } from "./dom.js";

export class RunList {
  constructor(root, { open, choose }) {
    Object.assign(this, { root, open, choose });
    this.items = element("ul");
    this.note = element("p", { class: "note", hidden: true });
    root.append(this.items, this.note);
    this.said = "";
  }

  /** Show what was found (undefined: as before); `ids` are those of the runs that are open. */
  show(found = this.found, ids = []) {
    this.found = found;
    if (!found) return;
    const said = JSON.stringify([found, ids]);
    if (said === this.said) return;
    this.said = said;
    const focused = this.items.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    this.items.replaceChildren(...found.runs.map((run) => this.item(run, ids)));
    if (focused) [...this.items.querySelectorAll("[data-key]")].find((each) => each.dataset.key === focused)?.focus();
    this.note.hidden = found.runs.length > 0;
    this.note.textContent = `No runs below ${found.roots.join(" or ")} yet.`;
  }

  item(run, ids) {
    const isShown = ids.includes(run.id);
    const box = element("input", {
      type: "checkbox",
      checked: isShown,
      "aria-label": `Show ${run.name || run.record} beside others`,
      onchange: () => this.choose(box.checked ? [...ids, run.id] : ids.filter((id) => id !== run.id)),
    });
    box.dataset.key = `box ${run.id}`;
    const far = run.num_steps ? `${run.step ?? 0} of ${run.num_steps} steps` : "";
    const left = run.seconds_left ? `, ${duration(run.seconds_left)} left` : "";
    const open = element(
      "button",
      { type: "button", onclick: () => this.open(run.id), title: run.folder },
      element("strong", {}, run.name || run.record),
      element("span", { class: "where" }, run.folder),
      element("span", { class: "when" }, `${run.started.replace("T", " ")}  ${far}${left}`),
      element("span", { class: "state", "data-state": run.state }, run.state),
    );
    open.dataset.key = `open ${run.id}`;
    return element("li", { class: isShown ? "run-item is-shown" : "run-item", "data-id": run.id }, box, open);
  }
}

/** Return seconds in words: "2 h 5 min". */
export function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.round((whole % 3600) / 60)} min`;
}
