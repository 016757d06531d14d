// The page: what is shown, what is asked for, and what happens elsewhere.
import { byId, element, later, plural } from "./dom.js";
import { Editor } from "./editor.js";
import { Grid } from "./grid.js";
import { listenToKeys, showHelp } from "./keys.js";
import { Panel } from "./panel.js";
import { CLIENT, get, listen, post } from "./server.js";
import { startTheme } from "./theme.js";
import { telling, toast } from "./toasts.js";

const query = byId("query");
const order = byId("order");
const direction = byId("direction");
const subset = byId("subset");
let questions = "";
let view = { ids: [], names: [], versions: [], l: [], g: [], over: [], total: 0 };
let isAsking = false;
let asksAgain = false;
let restsUntil = 0; // while the set is read: to answer takes the server's time from reading
const RESTS = 4; // as long as an answer takes

const grid = new Grid(byId("grid"), { open: (index) => editor.open(index), selected: () => showCounts() });
const editor = new Editor({
  view: () => view,
  closed: (index) => {
    grid.go(index);
    grid.root.focus();
    look();
  },
  history: showHistory,
});
const panel = new Panel({
  scope: () => ({ query: question(), numShown: view.ids.length, selected: [...grid.selection] }),
  find: (text) => ask(text),
  beforeEdit: () => !editor.isOpen || editor.flush(),
  changed: (outcome) => tell("Changed", outcome),
});

function question() {
  const parts = [query.value.trim(), subset.value && `subset:"${subset.value}"`].filter(Boolean);
  return parts.length > 1 ? `(${parts[0]}) ${parts[1]}` : (parts[0] ?? "");
}

function ask(text) {
  query.value = text;
  look();
  if (!editor.isOpen) grid.root.scrollTop = 0;
}

/** Ask for the images that answer the question, and show them: one question at a time, the latest last. */
async function look() {
  asksAgain = isAsking;
  if (isAsking) return;
  isAsking = true;
  const problem = byId("query-problem");
  const began = performance.now();
  try {
    const found = await get("/api/view", {
      query: question(),
      order: order.value,
      descending: direction.getAttribute("aria-pressed") === "true" ? 1 : 0,
    });
    problem.hidden = true;
    if (editor.isOpen) keepOpenImage(found);
    view = found;
    grid.show(view);
    showCounts();
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
  }
  isAsking = false;
  restsUntil = performance.now() + RESTS * (performance.now() - began);
  if (asksAgain) look();
}

/** An image that is being written stays in the list though it no longer answers the question. */
function keepOpenImage(found) {
  const index = found.ids.indexOf(editor.id);
  if (index >= 0) {
    editor.index = editor.wanted = index;
    return;
  }
  const old = view.ids.indexOf(editor.id);
  if (old < 0) return;
  const place = Math.min(editor.index, found.ids.length);
  for (const name of ["ids", "names", "versions", "l", "g", "over"]) found[name].splice(place, 0, view[name][old]);
  editor.index = editor.wanted = place;
}

function showCounts() {
  const { ids, total } = view;
  const num = grid.selection.size;
  const shown = ids.length === total ? plural(total, "image") : `${ids.length.toLocaleString("en")} of ${plural(total, "image")}`;
  byId("count").textContent = num ? `${shown}, ${num.toLocaleString("en")} selected` : shown;
  byId("nothing").hidden = ids.length > 0;
  byId("nothing").textContent = total ? "No image answers this question." : "No images yet.";
  panel.showScope();
}

function showHistory({ undo, redo }) {
  for (const [name, step] of Object.entries({ undo, redo })) {
    const shown = byId(name);
    shown.disabled = !step;
    shown.title = step ?? "";
  }
}

async function readSet() {
  const found = await telling(() => get("/api/set"));
  if (!found) return;
  questions = found.help;
  panel.machine.offer(found.machines);
  const name = found.names[0].split(/[\\/]/).filter(Boolean).pop() ?? "Studio";
  byId("set-name").textContent = found.names.length > 1 ? `${name} and ${found.names.length - 1} more` : name;
  byId("set-name").title = found.names.join("\n");
  document.title = `${name} – Studio`;
  const chosen = subset.value;
  subset.hidden = found.names.length < 2;
  subset.replaceChildren(
    element("option", { value: "" }, "all subsets"),
    ...found.names.map((each, index) => element("option", { value: each }, `${each} (${found.counts[index]})`)),
  );
  subset.value = found.names.includes(chosen) ? chosen : "";
  showProgress(found.is_loaded ? null : { done: found.progress[0], total: found.progress[1] });
  showHistory(found);
}

function showProgress(news) {
  const shown = byId("reading");
  shown.hidden = !news || !news.total;
  if (news?.total) Object.assign(shown, { max: news.total, value: news.done });
}

/** Undo or redo a step of the set. */
async function step(name) {
  if (editor.isOpen && !(await editor.flush())) return;
  const outcome = await telling(() => post(`/api/${name}`));
  if (outcome) tell(name === "undo" ? "Undone" : "Done again", outcome);
}

function tell(verb, outcome) {
  showHistory(outcome);
  toast(`${verb}: ${outcome.what} (${plural(outcome.num_written, "caption")})`);
  if (outcome.conflicts.length) {
    const names = outcome.conflicts.slice(0, 5).join(", ");
    toast(`${plural(outcome.conflicts.length, "caption")} left alone, changed by somebody else: ${names}`, true);
  }
  if (outcome.failed.length) {
    toast(`${plural(outcome.failed.length, "caption")} could not be written. ${outcome.failed[0]} Undo takes the others back.`, true);
  }
  look();
  if (editor.isOpen) editor.refresh();
}

const lookSoon = later(look, 150);
query.addEventListener("input", lookSoon);
query.addEventListener("keydown", (event) => event.key === "Enter" && grid.root.focus());
for (const control of [order, subset]) control.addEventListener("change", look);
direction.addEventListener("click", () => {
  direction.setAttribute("aria-pressed", String(direction.getAttribute("aria-pressed") !== "true"));
  look();
});
for (const each of document.querySelectorAll("[data-query]")) {
  each.addEventListener("click", () => ask(query.value === each.dataset.query ? "" : each.dataset.query));
}
byId("toggle-panel").addEventListener("click", () => panel.toggle());
byId("undo").addEventListener("click", () => step("undo"));
byId("redo").addEventListener("click", () => step("redo"));
byId("show-help").addEventListener("click", () => showHelp(questions));
startTheme(byId("theme"));

listenToKeys({
  isOpen: () => editor.isOpen,
  help: () => showHelp(questions),
  find: () => query.focus(),
  undo: () => step("undo"),
  redo: () => step("redo"),
  next: () => editor.step(1),
  previous: () => editor.step(-1),
  close: () => editor.close(),
  writeL: () => editor.focus("l"),
  writeG: () => editor.focus("g"),
  copy: () => editor.copyFromPrevious(),
  mode: () => editor.cards[editor.current ?? "l"].nextMode(),
  draws: () => editor.draws.show(),
});

listen({
  listed: () => (readSet(), look()),
  progress: (news) => {
    showProgress(news);
    if (performance.now() > restsUntil && !isAsking) lookSoon();
  },
  loaded: () => (readSet(), look()),
  writing: (news) => showProgress(news.done < news.total ? news : null),
  machine: (news) => panel.machine.tell(news),
  changed: (news) => {
    showHistory(news);
    showProgress(null);
    if (!editor.isOpen) lookSoon();
    const isOpen = editor.isOpen && (news.num > news.ids.length || news.ids.includes(editor.id));
    if (isOpen && news.client !== CLIENT) editor.refresh();
  },
  connected: () => {
    readSet();
    look();
    if (editor.isOpen) editor.flush();
  },
});

addEventListener("pagehide", () => editor.isOpen && editor.flush({ keepalive: true }));
addEventListener("beforeunload", (event) => editor.isOpen && editor.isDirty && event.preventDefault());
look();
