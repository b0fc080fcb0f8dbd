// Frames as they come over one endless answer, shown each at its time.
//
// A record is a length (4 bytes, big-endian), a kind, and content: kind 0 is the state as JSON, kind 1 a frame:
// video, index, version of the prompt (4 bytes each), due and sent by the server's clock (8 bytes each), a JPEG.

const GUARD = 0.03;      // seconds that a frame may come later than the quickest one did
const DECODED = 8;       // pictures that are decoded ahead of their display
const KEPT = 240;        // frames that wait at most: what comes then pushes out the oldest
const MEMORY = 480;      // display times that are remembered, for figures

export class Player {
  constructor(canvas, {onState, onFrame, onLost}) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", {alpha: false});
    Object.assign(this, {onState, onFrame, onLost});
    this.queue = [];         // frames in the order of their times
    this.offsets = [];       // [when, this page's clock less the server's], of the last seconds
    this.shown = [];         // when frames were shown, by this page's clock, and how late
    this.counts = {received: 0, shown: 0, skipped: 0, undecodable: 0, bytes: 0};
    this.draw = this.draw.bind(this);
    requestAnimationFrame(this.draw);
  }

  // Read for ever; after a failure again, a second later.
  async watch(who) {
    for (;;) {
      let line = "The connection is lost. Trying again.";
      try {
        const answer = await fetch("/frames", {headers: {"X-Window": who}, cache: "no-store"});
        if (answer.ok) {
          await this.read(answer.body.getReader());
        } else {
          line = (await answer.json()).error;
        }
      } catch { /* the server is gone, or the network */ }
      this.onLost(line);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }

  async read(reader) {
    let parts = [];          // of what has come and is not yet used
    let size = 0;
    let needed = 4;          // bytes until something can be done
    let inside = false;      // whether those are a record, not its length
    for (;;) {
      while (size < needed) {
        const {done, value} = await reader.read();
        if (done) return;
        parts.push(value);
        size += value.length;
      }
      const bytes = joined(parts, size);
      let at = 0;
      while (size - at >= needed) {
        const view = new DataView(bytes.buffer, bytes.byteOffset + at, needed);
        at += needed;
        if (inside) {
          this.take(view);
          needed = 4;
        } else {
          needed = view.getUint32(0);
        }
        inside = !inside;
      }
      parts = [bytes.subarray(at)];
      size -= at;
    }
  }

  take(view) {
    const content = new Uint8Array(view.buffer, view.byteOffset + 1, view.byteLength - 1);
    if (view.getUint8(0) === 0) {
      const state = JSON.parse(new TextDecoder().decode(content));
      this.clock(state.now);
      this.onState(state);
      return;
    }
    this.clock(view.getFloat64(21));
    const frame = {
      video: view.getUint32(1), index: view.getUint32(5), version: view.getUint32(9), due: view.getFloat64(13),
      jpeg: new Blob([content.slice(28)], {type: "image/jpeg"}), picture: null, decoding: false,
    };
    this.counts.received += 1;
    this.counts.bytes += view.byteLength;
    // Of another video nothing more is shown once a new one begins.
    if (this.queue.length && this.queue[0].video !== frame.video) this.forget();
    this.queue.push(frame);
    if (this.queue.length > KEPT || document.hidden) this.drop(document.hidden ? 1 : KEPT);
    if (!document.hidden) this.decode();
  }

  // How far this page's clock is from the server's: the least that was seen of late, since delays only add to it.
  clock(sent) {
    const now = performance.now() / 1000;
    this.offsets.push([now, now - sent]);
    while (this.offsets.length > 1 && this.offsets[0][0] < now - 20) this.offsets.shift();
    this.offset = Math.min(...this.offsets.map(([, offset]) => offset));
  }

  decode() {
    for (const frame of this.queue.slice(0, DECODED)) {
      if (frame.decoding) continue;
      frame.decoding = true;
      createImageBitmap(frame.jpeg).then((picture) => {
        frame.picture = picture;
        if (frame.forgotten) picture.close();
      }, () => {
        this.counts.undecodable += 1;
        frame.broken = true;
      });
    }
  }

  draw() {
    requestAnimationFrame(this.draw);
    const now = performance.now() / 1000;
    // The newest frame whose time has come, and which is decoded; older ones are skipped.
    let chosen = -1;
    for (let i = 0; i < this.queue.length; i++) {
      const frame = this.queue[i];
      if (frame.due + this.offset + GUARD > now + 0.004) break;
      if (frame.picture) chosen = i;
    }
    if (chosen < 0) {
      while (this.queue.length && this.queue[0].broken) this.queue.shift();
      return;
    }
    const frame = this.queue[chosen];
    this.drop(this.queue.length - chosen);
    const {width, height} = frame.picture;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    this.context.drawImage(frame.picture, 0, 0);
    frame.picture.close();
    this.queue.shift();
    this.counts.shown += 1;
    this.shown.push([now, now - frame.due - this.offset, frame.index]);
    if (this.shown.length > MEMORY) this.shown.shift();
    this.decode();
    this.onFrame(frame, now);
  }

  // Leave the last `keep` of what waits.
  drop(keep) {
    while (this.queue.length > keep) {
      const frame = this.queue.shift();
      frame.forgotten = true;
      frame.picture?.close();
      this.counts.skipped += 1;
    }
  }

  forget() {
    this.drop(0);
    this.shown = [];
  }

  // Frames a second over the last two.
  rate() {
    const since = performance.now() / 1000 - 2;
    const times = this.shown.map(([time]) => time).filter((time) => time > since);
    if (times.length < 2) return this.shown.length ? times.length / 2 : null;
    return (times.length - 1) / (times.at(-1) - times[0]);
  }
}

function joined(parts, size) {
  if (parts.length === 1) return parts[0];
  const bytes = new Uint8Array(size);
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}
