// Captions by machine: begun for the images that are chosen, and shown as changes before any is made.
import { button, element } from "./dom.js";
import { post } from "./server.js";
import { telling, toast } from "./toasts.js";

const LABELS = { tags: "Tags for L", sentences: "Sentences for G" };

export class MachineSection {
  /** `scope()` names the images, `show(request)` shows proposals. */
  constructor({ scope, beforeEdit, show }) {
    Object.assign(this, { scope, beforeEdit, show });
    this.buttons = element("div", { class: "machine-buttons" });
    this.bar = element("progress", { "aria-label": "Captions made by machine", hidden: true });
    this.state = element("p", { class: "note", role: "status" });
    this.cancel = button("Cancel", () => telling(() => post("/api/machine/cancel")), { hidden: true });
    this.root = element(
      "section",
      { class: "machine", "aria-label": "Captions by machine", hidden: true },
      element("h2", {}, "Captions by machine"),
      this.buttons,
      this.bar,
      this.state,
      this.cancel,
    );
  }

  /** Show which machines there are. */
  offer(kinds) {
    this.root.hidden = !kinds.length;
    if (this.isRunning) return;
    this.buttons.replaceChildren(...kinds.map((kind) => button(LABELS[kind], () => this.start(kind))));
  }

  async start(kind) {
    if (!(await this.beforeEdit())) return;
    this.isMine = true;
    if (await telling(() => post("/api/machine", { machine: kind, ...this.scope() }))) this.tell({ done: 0, total: 0 });
  }

  /** Take in how far it is; whoever began it is shown the proposals in the end. */
  tell({ done, total, is_over: isOver = false, problem = null, machine }) {
    this.isRunning = !isOver;
    for (const each of this.buttons.children) each.disabled = !isOver;
    this.bar.hidden = this.cancel.hidden = isOver;
    if (total) Object.assign(this.bar, { max: total, value: done });
    else this.bar.removeAttribute("value");
    this.state.textContent = isOver ? "" : total ? `${done} of ${total} images` : "opening the model";
    if (!isOver) return;
    if (problem) toast(problem, true);
    if (this.isMine && done && problem !== "cancelled") this.show({ machine });
    this.isMine = false;
  }
}
