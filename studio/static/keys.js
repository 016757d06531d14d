// The keys, and the page that lists them.
import { button, byId, element } from "./dom.js";

const KEYS = [
  ["All images", [
    ["Arrows, Page Up, Page Down, Home, End", "go to another image"],
    ["Enter", "write its captions"],
    ["Space, Shift+arrows, Ctrl+A", "select; Escape selects nothing"],
    ["/", "find"],
  ]],
  ["One image", [
    ["Page Down, Page Up", "next image, previous image"],
    ["Alt+L, Alt+G", "write L, write G"],
    ["Alt+C", "copy this caption from the previous image"],
    ["Alt+T", "tags, text or raw lines"],
    ["Alt+W", "what training will see"],
    ["Escape", "back to all images"],
  ]],
  ["Tags", [
    ["Left, Right", "go to another tag"],
    ["Alt+Left, Alt+Right", "move the tag"],
    ["Enter, Delete", "change it, remove it"],
  ]],
  ["Everywhere", [
    ["Ctrl+Z, Ctrl+Shift+Z", "undo and redo changes of the set (in a field: of what was typed)"],
    ["F1", "this page"],
  ]],
];

/** Fill and show the help. `questions` explains what can be asked. */
export function showHelp(questions) {
  const dialog = byId("help");
  dialog.replaceChildren(
    element("h2", { id: "help-title" }, "Help"),
    ...KEYS.flatMap(([title, keys]) => [
      element("h3", {}, title),
      element("dl", { class: "keys" }, ...keys.flatMap(([key, what]) => [element("dt", {}, ...pressed(key)), element("dd", {}, what)])),
    ]),
    element("h3", {}, "Questions"),
    element("p", { class: "note" }, questions),
    element("div", { class: "dialog-actions" }, button("Close", () => dialog.close())),
  );
  dialog.showModal();
}

function pressed(keys) {
  return keys.split(", ").flatMap((key, index) => [index ? " " : "", element("kbd", {}, key)]);
}

const isField = (target) => target.matches?.("input, textarea, select, [contenteditable]");

/** Call the action of each key. `actions` says what to do, and whether an image is open. */
export function listenToKeys(actions) {
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.isComposing) return;
    const withControl = event.ctrlKey || event.metaKey;
    if (event.key === "F1") actions.help();
    else if (withControl && event.code === "KeyZ" && !isField(event.target)) actions[event.shiftKey ? "redo" : "undo"]();
    else if (event.key === "/" && !isField(event.target)) actions.find();
    else if (actions.isOpen() && !withControl && pressedInEditor(event, actions)) return event.preventDefault();
    else return undefined;
    return event.preventDefault();
  });
}

function pressedInEditor(event, actions) {
  if (event.altKey) {
    const action = { KeyL: "writeL", KeyG: "writeG", KeyC: "copy", KeyT: "mode", KeyW: "draws" }[event.code];
    if (action) actions[action]();
    return Boolean(action);
  }
  const action = { PageDown: "next", PageUp: "previous", Escape: "close" }[event.key];
  if (action) actions[action]();
  return Boolean(action);
}
