// Short messages at the bottom of the page.
import { byId, element } from "./dom.js";

const SHOWN_MS = 5000;
const PROBLEM_SHOWN_MS = 12000;

/** Show a message for some seconds. */
export function toast(text, isProblem = false) {
  const shown = element("div", { class: isProblem ? "toast problem" : "toast" }, text);
  byId("toasts").append(shown);
  setTimeout(() => shown.remove(), isProblem ? PROBLEM_SHOWN_MS : SHOWN_MS);
}

/** Run what asks the server, and show what goes wrong. */
export async function telling(action) {
  try {
    return await action();
  } catch (error) {
    toast(error.message, true);
    return undefined;
  }
}
