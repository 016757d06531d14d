// Small versions of samples, ready to be drawn: files are kept as they came, and those near the step are decoded.
const AT_ONCE = 6;
const MOST_FILES = 6000;
const MOST_DECODED = 320;

export class PictureStore {
  /** `came(address)` is called when one can be drawn. */
  constructor(came) {
    this.came = came;
    this.files = new Map(); // address to blob, null for one that cannot be had
    this.decoded = new Map(); // address to bitmap, the one used last at the end
    this.wanted = [];
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

  /** Say what is wanted, most urgent first; `near` of them are decoded, the others only fetched. */
  want(addresses, near) {
    this.near = new Set(addresses.slice(0, near));
    this.wanted = addresses.filter((address) => !this.files.has(address) || (this.near.has(address) && !this.decoded.has(address) && this.files.get(address)));
    this.go();
  }

  go() {
    while (this.running.size < AT_ONCE && this.wanted.length && !this.isClosed) {
      const address = this.wanted.shift();
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
      while (this.decoded.size > MOST_DECODED) {
        const [oldest, bitmap] = this.decoded.entries().next().value;
        this.decoded.delete(oldest);
        bitmap.close();
      }
      return this.came(address);
    } catch {
      this.files.set(address, null);
      return this.came(address);
    }
  }

  close() {
    this.isClosed = true;
    for (const bitmap of this.decoded.values()) bitmap.close();
    this.decoded.clear();
  }
}
