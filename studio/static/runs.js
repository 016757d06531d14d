// The page of runs: which are shown, in which view, and asking again while they go on.
import { button, byId, element } from "./dom.js";
import { CommandForm } from "./command_form.js";
import { Look } from "./look.js";
import { RunList } from "./run_list.js";
import { aboutRun, RunLog } from "./run_facts.js";
import { RunWatch } from "./run_watch.js";
import { get, post } from "./server.js";
import { startTheme } from "./theme.js";
import { telling, toast } from "./toasts.js";

const ASKS_MS = 1000;
const ASKS_OF_ENDED_MS = 4000;
const LISTS_MS = 3000;
const VIEWS = [["watch", "Curves"], ["look", "Samples"], ["log", "Log"], ["about", "Options and files"]];
const GOES_ON = ["runs", "starts", "on another machine"];

const shown = byId("shown");
let ids = [];
let view = "watch";
let parts = null; // of what is shown
let timer = 0;

const list = new RunList(byId("run-list"), {
  open: (id) => go({ runs: [id] }),
  choose: (chosen) => chosen.length && go({ runs: chosen }),
});
const form = new CommandForm({ started: (id) => (readList(), go({ runs: [id], view: "watch" })) });

/** Go to some runs, a view, or the form; the address remembers it. */
function go(wanted) {
  const said = new URLSearchParams();
  const wantedIds = wanted.runs ?? ids;
  if (wantedIds.length) said.set("runs", wantedIds.join(","));
  said.set("view", wanted.view ?? (view === "new" ? "watch" : view));
  if (wanted.from) said.set("from", wanted.from);
  location.hash = said.toString();
}

function follow() {
  const said = new URLSearchParams(location.hash.slice(1));
  ids = (said.get("runs") ?? "").split(",").filter(Boolean);
  view = said.get("view") ?? "watch";
  clearTimeout(timer);
  list.show(undefined, ids);
  parts?.close?.();
  parts = null;
  if (view === "new") {
    shown.replaceChildren(form.root);
    form.open(said.get("from"));
  } else if (ids.length) {
    build();
    ask();
  } else {
    shown.replaceChildren(element("p", { class: "soft" }, "Choose a run, or several to see them side by side."));
  }
}

function build() {
  const head = element("div", { class: "run-head" });
  const notes = element("ul", { class: "notes" });
  const body = element("div", { id: "view", role: "tabpanel", "aria-labelledby": `tab-${view}` });
  const tabs = element(
    "div",
    { class: "tabs", role: "tablist", "aria-label": "Views" },
    ...VIEWS.map(([name, label]) =>
      button(label, () => go({ view: name }), {
        id: `tab-${name}`,
        role: "tab",
        "aria-selected": String(name === view),
        "aria-controls": "view",
      }),
    ),
  );
  shown.replaceChildren(head, notes, tabs, body);
  const made = { watch: () => new RunWatch(), look: () => new Look(), log: () => new RunLog() }[view]?.();
  if (made) body.append(made.root);
  parts = { head, notes, body, made, close: () => made?.close?.() };
}

async function ask() {
  clearTimeout(timer);
  if (!parts) return;
  const asked = ids;
  const { head, notes, body, made } = parts;
  const answers = await Promise.all(ids.map((id) => get(`/api/runs/${id}`).catch((error) => ({ id, problem: error.message }))));
  if (asked !== ids || !parts || parts.head !== head) return;
  head.replaceChildren(...heading(answers));
  notes.replaceChildren(...answers.flatMap(notesOf));
  const there = answers.filter((run) => !run.problem);
  if (made) await made.show(there);
  else if (body.dataset.said !== JSON.stringify(there)) {
    body.dataset.said = JSON.stringify(there);
    body.replaceChildren(...there.map(aboutRun));
  }
  if (asked !== ids || !parts || parts.head !== head) return;
  const isOver = answers.every((run) => !GOES_ON.includes(run.state));
  timer = setTimeout(() => (document.hidden ? waitUntilSeen() : ask()), isOver ? ASKS_OF_ENDED_MS : ASKS_MS);
}

/** Nobody looks: nothing is asked for. */
function waitUntilSeen() {
  document.addEventListener("visibilitychange", ask, { once: true });
}

function heading(answers) {
  const title = answers.map((run) => run.name || run.record || "a run without a name").join(" and ");
  const made = [element("h2", {}, title)];
  if (answers.length !== 1 || answers[0].problem) return made;
  const [run] = answers;
  made.push(element("span", { class: "state", "data-state": run.state }, run.state));
  const goesOn = ["runs", "starts"].includes(run.state);
  const elsewhere = run.state === "on another machine";
  const actions = [];
  if (run.state === "runs" || elsewhere) {
    actions.push(button("Save now", () => request(run, "save", "It will save after this step.")));
  }
  if (goesOn || elsewhere) actions.push(button("Stop", () => request(run, "stop", "It will save and stop after this step.")));
  if (!goesOn && !elsewhere && run.can_resume && run.state !== "finished") {
    actions.push(button("Resume", () => request(run, "resume", "It goes on from its newest state."), { class: "main" }));
  }
  actions.push(button("Use its options", () => go({ runs: [], view: "new", from: run.id })));
  actions.push(button("Report", () => makeReport(run)));
  made.push(element("div", { class: "actions" }, ...actions));
  return made;
}

function notesOf(run) {
  const said = [];
  if (run.problem) said.push([run.problem, true]);
  if (run.message) said.push([run.message, ["failed", "vanished"].includes(run.state)]);
  if (run.state === "vanished") said.push(["The run ended without a word: it was killed, or the machine went down.", true]);
  for (const note of run.notes ?? []) said.push([note, /damaged|cannot|not there/.test(note)]);
  return said.map(([text, isProblem]) => element("li", { class: isProblem ? "problem" : "" }, text));
}

async function request(run, what, done) {
  const answer = await telling(() => post(`/api/runs/${run.id}/${what}`));
  if (!answer) return;
  toast(done);
  ask();
  readList();
}

async function makeReport(run) {
  const made = await telling(() => post(`/api/runs/${run.id}/report`));
  if (!made) return;
  toast(`The report is '${made.name}' in '${made.folder}'.`);
  element("a", { href: `/runs/${run.id}/report`, download: made.name }).click();
}

let listing = 0;
async function readList() {
  clearTimeout(listing);
  const trouble = byId("trouble");
  try {
    const found = await get("/api/runs");
    byId("to-set").hidden = !found.has_set;
    list.show(found, ids);
    trouble.textContent = found.problems.slice(0, 5).join("; ");
  } catch (error) {
    trouble.textContent = error.message;
  }
  trouble.hidden = !trouble.textContent;
  listing = setTimeout(
    () => (document.hidden ? document.addEventListener("visibilitychange", readList, { once: true }) : readList()),
    LISTS_MS,
  );
}

byId("new-run").addEventListener("click", () => go({ runs: [], view: "new" }));
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.target.matches?.("input, textarea, select")) return;
  if (parts?.made?.pressed?.(event)) event.preventDefault();
});
addEventListener("hashchange", follow);
startTheme(byId("theme"));
follow();
readList();
