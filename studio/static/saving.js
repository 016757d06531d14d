// Writes one caption a moment after it changed, each time only over the version that was seen.
import { putCaption, CLIENT } from "./server.js";

const WAIT_MS = 500;
const RETRY_MS = 2000;
let sessions = 0;

export class Saving {
  /**
   * `told(state, detail)` is called with "saved", "waiting", "away" (no server), "failed" (with the reason) and
   * "conflict" (with the caption as it is by now). `written(answer)` follows each save.
   */
  constructor(id, encoder, tag, { told, written }) {
    Object.assign(this, { id, encoder, tag, told, written });
    this.group = `${CLIENT}-${(sessions += 1)}`; // what one visit of an image changes is undone together
    this.queue = []; // bodies of requests, oldest first
    this.running = null;
    this.isInConflict = false;
  }

  get isDirty() {
    return this.queue.length > 0 || this.running !== null;
  }

  /** Write this soon. Of several changes of the same lines the latest is enough. */
  change(body) {
    if (this.queue.length && kind(this.queue.at(-1)) === kind(body)) this.queue.pop();
    this.queue.push(body);
    clearTimeout(this.timer);
    if (this.isInConflict) return; // which stays in view until it is decided
    this.told("waiting");
    this.timer = setTimeout(() => this.flush(), WAIT_MS);
  }

  /** Write what is pending now; the promise is true when nothing is left to be written. */
  async flush({ keepalive = false } = {}) {
    clearTimeout(this.timer);
    while (this.running) await this.running;
    while (this.queue.length && !this.isInConflict) {
      this.running = this.write(this.queue.shift(), keepalive);
      const isWritten = await this.running;
      this.running = null;
      if (!isWritten) return false;
    }
    return !this.queue.length;
  }

  async write(body, keepalive) {
    try {
      const answer = await putCaption(this.id, this.encoder, this.tag, { ...body, group: this.group }, keepalive);
      this.tag = answer.caption.tag;
      if (!this.queue.length) this.told("saved");
      this.written(answer, !this.queue.length);
      return true;
    } catch (error) {
      if (!this.queue.length || kind(this.queue[0]) !== kind(body)) this.queue.unshift(body);
      if (error.status === 412) {
        this.isInConflict = true;
        this.told("conflict", error.now);
      } else if (error.status === 0) {
        this.told("away", error.message);
        this.timer = setTimeout(() => this.flush(), RETRY_MS);
      } else {
        this.told("failed", error.message);
      }
      return false;
    }
  }

  /**
   * End a conflict by writing what is here over the version with this tag, which the undo journal keeps. `body` is what
   * is here where nothing waits to be written.
   */
  keepMine(tag, body) {
    this.tag = tag;
    this.isInConflict = false;
    if (!this.queue.length) this.change(body);
    return this.flush();
  }

  /** End a conflict by forgetting what was to be written. */
  takeTheirs(tag) {
    clearTimeout(this.timer);
    this.tag = tag;
    this.queue = [];
    this.isInConflict = false;
    this.told("saved");
  }
}

/** Return what tells changes of different lines apart; a variant that is added or removed is never left out. */
function kind(body) {
  return "raw" in body ? "raw" : "text" in body ? `variant ${body.variant}` : Symbol("once");
}
