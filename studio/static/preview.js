// Every change of an edit before it is made.
import { button, byId, element, plural } from "./dom.js";

/** Show a plan; `more(offset)` returns its next changes, `apply()` makes them, `done(outcome)` follows. */
export function showPreview(plan, { more, apply, done }) {
  const dialog = byId("preview");
  const list = element("ol", { class: "diffs", tabIndex: 0, "aria-label": "Changes" }, ...plan.changes.map(change));
  let numShown = plan.changes.length;
  const moreButton = button("Show more", async () => {
    const next = await more(numShown);
    if (!next) return;
    list.append(...next.changes.map(change));
    numShown += next.changes.length;
    moreButton.hidden = numShown >= plan.num;
  });
  moreButton.hidden = numShown >= plan.num;
  const applyButton = button(`Change ${plural(plan.num, "caption")}`, async () => {
    applyButton.disabled = true;
    const outcome = await apply();
    dialog.close();
    if (outcome) done(outcome);
  }, { class: "main" });
  dialog.replaceChildren(
    element("h2", { id: "preview-title" }, `${plan.what}`),
    element(
      "p",
      { class: "note" },
      `${plural(plan.num, "caption")} of ${plural(plan.num_images, "image")} would change. It is one step, which Undo takes back.`,
    ),
    ...plan.left_out.slice(0, 10).map((why) => element("p", { class: "note" }, `Left out: ${why}`)),
    list,
    element("div", { class: "dialog-actions" }, moreButton, button("Cancel", () => dialog.close()), applyButton),
  );
  dialog.showModal();
  applyButton.focus();
}

function change({ id, name, encoder, before, after }) {
  const [start, old, now, end] = difference(before.trimEnd(), after.trimEnd());
  return element(
    "li",
    {},
    element("img", { alt: "", src: `/thumbnails/${id}`, loading: "lazy" }),
    element(
      "div",
      {},
      element("span", { class: "who" }, `${name}, ${encoder.toUpperCase()}`),
      element("p", {}, start, element("del", {}, old), element("ins", {}, now), end),
    ),
  );
}

/** Return what two texts begin with, what only the first has, what only the second has, and what both end with. */
export function difference(one, other) {
  const [words, others] = [one, other].map((text) => text.match(/\s+|[\p{L}\p{N}_-]+|[^\s\p{L}\p{N}_-]/gu) ?? []);
  let first = 0;
  while (first < Math.min(words.length, others.length) && words[first] === others[first]) first += 1;
  let last = 0;
  const most = Math.min(words.length, others.length) - first;
  while (last < most && words.at(-1 - last) === others.at(-1 - last)) last += 1;
  const cut = (parts, from, to) => parts.slice(from, to).join("");
  return [
    cut(words, 0, first),
    cut(words, first, words.length - last),
    cut(others, first, others.length - last),
    cut(words, words.length - last),
  ];
}
