// How an image was drawn, and the line of a prompt file that draws it again.
import { button, byId, element } from "./dom.js";
import { get } from "./server.js";
import { telling, toast } from "./toasts.js";

/** Show prompts and settings of an image of a run. */
export async function showPicture(run, picture) {
  if (!picture) return;
  const found = await telling(() => get(`/api/runs/${run}/samples/${picture}`));
  if (!found) return;
  const dialog = byId("about-picture");
  const line = element("textarea", { readOnly: true, rows: 4, "aria-label": "Prompt line", value: found.line, class: "prompt-line" });
  dialog.replaceChildren(
    element("h2", { id: "about-title" }, found.name),
    line,
    element(
      "dl",
      { class: "keys" },
      ...Object.entries(found.texts).flatMap(([name, text]) => [element("dt", {}, name.replaceAll("_", " ")), element("dd", {}, text)]),
    ),
    element(
      "div",
      { class: "dialog-actions" },
      button("Copy the prompt line", () => copy(line), { class: "main" }),
      element("a", { href: `/runs/${run}/samples/${picture}`, download: found.name }, "Save the image"),
      button("Close", () => dialog.close()),
    ),
  );
  dialog.showModal();
}

/** Copy the text of a field; where the browser does not allow that, it is selected. */
export async function copy(field) {
  try {
    await navigator.clipboard.writeText(field.value);
    toast("Copied.");
  } catch {
    field.focus();
    field.select();
    toast("The browser does not let this page copy: press Ctrl+C.");
  }
}
