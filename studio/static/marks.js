// Which parts of a text are cut off, and which words stand in the other caption too.
import { element } from "./dom.js";

const WORD = /[\p{L}\p{N}_]{3,}/gu;

/** Return the parts of a text with what holds for each. `cut` is the end of the text that no encoder reads. */
export function parts(text, cut, shared) {
  const end = cut && text.endsWith(cut) ? text.length - cut.length : text.length;
  const found = [];
  let from = 0;
  const push = (to, isShared) => {
    for (const [first, last, isCut] of [
      [from, Math.min(to, Math.max(from, end)), false],
      [Math.max(from, end), to, true],
    ]) {
      if (first < last) found.push({ text: text.slice(first, last), isShared, isCut });
    }
    from = to;
  };
  for (const match of text.matchAll(WORD)) {
    if (!shared.has(match[0].toLowerCase())) continue;
    push(match.index, false);
    push(match.index + match[0].length, true);
  }
  push(text.length, false);
  return found;
}

/** Return these parts as elements. */
export function marked(text, cut, shared) {
  return parts(text, cut, shared).map((part) => {
    const name = [part.isShared && "shared", part.isCut && "cut"].filter(Boolean).join(" ");
    return name ? element("span", { class: name }, part.text) : document.createTextNode(part.text);
  });
}
