// Small versions of samples, ready to be drawn: files are kept as they came, and those near the step are decoded.
const AT_ONCE = 6;
const MOST_FILES = 6000;
const SPARE_DECODED = 64; // beside those that are near

export class PictureStore {
  /** `came(address)` is called when one can be drawn. */
  constructor(came) {
    this.came = came;
    this.files = new Map(); // address to blob, null for one that cannot be had
    this.decoded = new Map(); // address to bitmap, the one used last at the end
    this.near = new Set();
    this.wanted = [];
    this.far = [].values();
    this.running = new Set();
    this.isClosed = false;
  }

  /** Return the bitmap of an address, undefined while it is not here. */
  get(address) {
    const bitmap = this.decoded.get(address);
    if (bitmap) {
      this.decoded.delete(address);
      this.decoded.set(address, bitmap);
    }
    return bitmap;
  }

  isMissing(address) {
    return this.files.get(address) === null;
  }

  /** Say what is wanted, most urgent first: `near` is decoded; `far`, an iterator, is only fetched, when nothing near is left. */
  want(near, far) {
    this.near = new Set(near);
    this.wanted = [...this.near].filter((address) => !this.decoded.has(address) && this.files.get(address) !== null);
    this.far = far;
    this.go();
  }

  /** Return what to bring next, undefined if everything is here. */
  next() {
    if (this.wanted.length) return this.wanted.shift();
    for (let each = this.far.next(); !each.done; each = this.far.next()) if (!this.files.has(each.value)) return each.value;
    return undefined;
  }

  go() {
    while (this.running.size < AT_ONCE && !this.isClosed) {
      const address = this.next();
      if (address === undefined) return;
      if (this.running.has(address)) continue;
      this.running.add(address);
      this.bring(address).finally(() => {
        this.running.delete(address);
        this.go();
      });
    }
  }

  async bring(address) {
    try {
      if (!this.files.has(address)) {
        const answer = await fetch(address);
        this.files.set(address, answer.ok ? await answer.blob() : null);
        if (this.files.size > MOST_FILES) this.files.delete(this.files.keys().next().value);
      }
      const file = this.files.get(address);
      if (!file) return this.came(address);
      if (!this.near.has(address) || this.decoded.has(address)) return undefined;
      this.decoded.set(address, await createImageBitmap(file));
      this.forgetFar();
      return this.came(address);
    } catch {
      this.files.set(address, null);
      return this.came(address);
    }
  }

  /** Forget the bitmaps that were used longest ago, but none that is near. */
  forgetFar() {
    let tooMany = this.decoded.size - this.near.size - SPARE_DECODED;
    for (const [address, bitmap] of this.decoded) {
      if (tooMany <= 0) return;
      if (this.near.has(address)) continue;
      this.decoded.delete(address);
      bitmap.close();
      tooMany -= 1;
    }
  }

  close() {
    this.isClosed = true;
    for (const bitmap of this.decoded.values()) bitmap.close();
    this.decoded.clear();
  }
}
