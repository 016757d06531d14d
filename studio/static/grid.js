// A grid of thumbnails of which only the rows in sight exist. Rows are used again, and while the scroll bar is dragged
// no image is asked for.
import { element } from "./dom.js";

const WANTED_WIDTH = 190;
const GAP = 12;
const SIDE = 14;
const BELOW_IMAGE = 58;
const ROWS_BEYOND = 1;
const FAST_ROWS = 2.5; // in one frame
const REST_MS = 90;

export class Grid {
  /** `open(index)` is called for an image that is chosen, `selected(ids)` when the selection changes. */
  constructor(root, { open, selected }) {
    this.root = root;
    this.open = open;
    this.selected = selected;
    this.view = { ids: [], names: [], versions: [], l: [], g: [], over: [] };
    this.active = 0;
    this.anchor = 0;
    this.selection = new Set();
    this.inSight = new Map(); // row number to row element
    this.spare = [];
    this.lastTop = 0;
    this.isHolding = false;
    Object.entries({ role: "grid", tabindex: "0", "aria-label": "Images", "aria-multiselectable": "true" }).forEach(
      ([name, value]) => root.setAttribute(name, value),
    );
    this.rows = element("div", { class: "rows", role: "rowgroup" });
    root.append(this.rows);
    root.addEventListener("scroll", () => this.scrolled(), { passive: true });
    root.addEventListener("keydown", (event) => this.pressed(event));
    root.addEventListener("click", (event) => this.clicked(event));
    root.addEventListener("dblclick", (event) => this.cellOf(event) !== null && this.open(this.cellOf(event)));
    new ResizeObserver(() => this.measure()).observe(root);
    this.measure();
  }

  show(view) {
    const id = this.view.ids[this.active];
    this.view = view;
    this.active = Math.max(0, view.ids.indexOf(id));
    const there = new Set(view.ids);
    for (const each of this.selection) if (!there.has(each)) this.selection.delete(each);
    this.selected(this.selection);
    this.measure();
  }

  get numRows() {
    return Math.ceil(this.view.ids.length / this.columns);
  }

  measure() {
    const width = this.root.clientWidth - 2 * SIDE;
    const columns = Math.max(1, Math.floor((width + GAP) / (WANTED_WIDTH + GAP)));
    if (columns !== this.columns) {
      this.columns = columns;
      this.rows.replaceChildren();
      this.inSight.clear();
      this.spare = [];
    }
    this.cellWidth = (width - GAP * (columns - 1)) / columns;
    this.rowHeight = Math.round(this.cellWidth + BELOW_IMAGE + GAP);
    this.rows.style.height = `${this.numRows * this.rowHeight}px`;
    this.root.setAttribute("aria-rowcount", this.numRows);
    this.root.setAttribute("aria-colcount", columns);
    for (const [number, row] of this.inSight) this.fill(row, number);
    this.render();
  }

  scrolled() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      const top = this.root.scrollTop;
      this.isHolding = Math.abs(top - this.lastTop) > FAST_ROWS * this.rowHeight;
      this.lastTop = top;
      this.render();
      clearTimeout(this.rest);
      this.rest = setTimeout(() => {
        this.isHolding = false;
        this.loadImages();
      }, REST_MS);
    });
  }

  render() {
    const first = Math.max(0, Math.floor(this.root.scrollTop / this.rowHeight) - ROWS_BEYOND);
    const inView = Math.ceil(this.root.clientHeight / this.rowHeight);
    const last = Math.min(this.numRows - 1, first + inView + 2 * ROWS_BEYOND);
    for (const [number, row] of this.inSight) {
      if (number < first || number > last) {
        this.inSight.delete(number);
        this.spare.push(row);
      }
    }
    for (let number = first; number <= last; number += 1) {
      if (this.inSight.has(number)) continue;
      const row = this.spare.pop() ?? this.newRow();
      this.inSight.set(number, row);
      this.fill(row, number);
    }
    for (const row of this.spare) {
      row.hidden = true;
      for (const cell of row.children) cell.id = "";
    }
    if (!this.isHolding) this.loadImages();
    this.markActive();
  }

  newRow() {
    const row = element("div", { class: "row", role: "row" });
    row.style.gridTemplateColumns = `repeat(${this.columns}, minmax(0, 1fr))`;
    for (let column = 0; column < this.columns; column += 1) {
      const image = element("img", { alt: "", decoding: "async", draggable: false });
      const name = element("div", { class: "name" });
      const [countL, countG] = ["l", "g"].map((encoder) => element("span", { class: `count ${encoder}` }));
      const cell = element(
        "div",
        { class: "cell", role: "gridcell", "aria-colindex": column + 1 },
        element("div", { class: "frame" }, image),
        name,
        element("div", { class: "counts" }, countL, countG),
      );
      Object.assign(cell, { image, name, countL, countG });
      row.append(cell);
    }
    this.rows.append(row);
    return row;
  }

  fill(row, number) {
    row.hidden = false;
    row.setAttribute("aria-rowindex", number + 1);
    row.style.transform = `translateY(${number * this.rowHeight}px)`;
    row.style.height = `${this.rowHeight}px`;
    [...row.children].forEach((cell, column) => this.fillCell(cell, number * this.columns + column));
  }

  fillCell(cell, index) {
    const { ids, names, l, g, over } = this.view;
    const isThere = index < ids.length;
    cell.classList.toggle("empty", !isThere);
    cell.index = isThere ? index : null;
    cell.id = isThere ? `image-${ids[index]}` : "";
    if (!isThere) {
      cell.image.removeAttribute("src");
      for (const shown of [cell.name, cell.countL, cell.countG]) shown.textContent = "";
      for (const shown of [cell.countL, cell.countG]) shown.classList.remove("over", "none");
      return;
    }
    cell.name.textContent = names[index];
    cell.name.title = names[index];
    showCount(cell.countL, "L", l[index], over[index] & 1);
    showCount(cell.countG, "G", g[index], over[index] & 2);
    cell.setAttribute("aria-selected", this.selection.has(ids[index]));
    cell.wanted = `/thumbnails/${ids[index]}?v=${this.view.versions[index]}`;
    if (cell.image.getAttribute("src") !== cell.wanted) cell.image.removeAttribute("src");
  }

  loadImages() {
    for (const row of this.inSight.values()) {
      for (const { image, wanted, index } of row.children) {
        if (index !== null && wanted && image.getAttribute("src") !== wanted) image.src = wanted;
      }
    }
  }

  markActive() {
    const id = `image-${this.view.ids[this.active]}`;
    let isInSight = false;
    for (const row of this.inSight.values()) {
      for (const cell of row.children) {
        const isActive = cell.id === id;
        cell.classList.toggle("active", isActive);
        isInSight ||= isActive;
      }
    }
    if (isInSight) this.root.setAttribute("aria-activedescendant", id);
    else this.root.removeAttribute("aria-activedescendant");
  }

  /** Go to an image, so that it can be seen. */
  go(index, { extends: isExtending = false } = {}) {
    if (!this.view.ids.length) return;
    this.active = Math.min(Math.max(0, index), this.view.ids.length - 1);
    if (isExtending) this.selectRange(this.anchor, this.active);
    else this.anchor = this.active;
    const top = Math.floor(this.active / this.columns) * this.rowHeight;
    const { scrollTop, clientHeight } = this.root;
    if (top < scrollTop) this.root.scrollTop = top;
    else if (top + this.rowHeight > scrollTop + clientHeight) this.root.scrollTop = top + this.rowHeight - clientHeight;
    this.render();
  }

  pressed(event) {
    const page = Math.max(1, Math.floor(this.root.clientHeight / this.rowHeight)) * this.columns;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns, PageDown: page, PageUp: -page };
    const isPlain = !event.altKey && !event.ctrlKey && !event.metaKey;
    if (isPlain && event.key in steps) this.go(this.active + steps[event.key], { extends: event.shiftKey });
    else if (event.key === "Home") this.go(0, { extends: event.shiftKey });
    else if (event.key === "End") this.go(this.view.ids.length - 1, { extends: event.shiftKey });
    else if (isPlain && event.key === "Enter") this.open(this.active);
    else if (isPlain && event.key === " ") this.toggle(this.active);
    else if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "a") this.selectRange(0, this.view.ids.length - 1);
    else if (isPlain && event.key === "Escape" && this.selection.size) this.clearSelection();
    else return;
    event.preventDefault();
  }

  cellOf(event) {
    return event.target.closest(".cell")?.index ?? null;
  }

  clicked(event) {
    const index = this.cellOf(event);
    if (index === null) return;
    if (event.ctrlKey || event.metaKey) this.toggle(index);
    this.go(index, { extends: event.shiftKey });
  }

  toggle(index) {
    const id = this.view.ids[index];
    if (!this.selection.delete(id)) this.selection.add(id);
    this.changedSelection();
  }

  selectRange(one, other) {
    this.selection = new Set(this.view.ids.slice(Math.min(one, other), Math.max(one, other) + 1));
    this.changedSelection();
  }

  clearSelection() {
    this.selection.clear();
    this.changedSelection();
  }

  changedSelection() {
    for (const row of this.inSight.values()) {
      for (const cell of row.children) {
        if (cell.index !== null) cell.setAttribute("aria-selected", this.selection.has(this.view.ids[cell.index]));
      }
    }
    this.selected(this.selection);
  }
}

function showCount(shown, letter, count, isOver) {
  const texts = { "-1": "–", "-2": "…", "-3": "!" };
  shown.textContent = `${letter} ${texts[count] ?? count}`;
  shown.classList.toggle("none", count < 0);
  shown.classList.toggle("over", Boolean(isOver) || count === -3);
  shown.title = isOver ? `${letter} is over the limit` : count === -1 ? `no text for ${letter}` : "";
}
