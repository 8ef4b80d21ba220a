// A trace that is still being written: the kernel sends what happens in pieces (views/live.py), and a bar says how full
// and how fast the engine is, and stops it.

/** The pieces that a model was sent, for all its views, those that are opened later too. */
class Feed {
  pieces = [];
  whole = true; // false: this page was loaded in the middle of it and lacks some; in the end `data` has all
  views = new Set();

  listen(model) {
    model.on("msg:custom", ({ number, pace }, [data]) => {
      this.whole &&= number === this.pieces.length;
      if (!this.whole) return;
      this.pieces.push({ data, pace });
      for (const view of this.views) view.take(this.pieces.at(-1));
    });
    model.on("change:data", () => {
      for (const view of this.views) view.end(this.whole);
      Object.assign(this, { pieces: [], whole: true });
    });
  }
}

function bytes(number) {
  const unit = Math.max(0, Math.min(3, Math.floor(Math.log10(Math.max(number, 1)) / 3)));
  return `${Number((number / 1000 ** unit).toPrecision(3))} ${["B", "kB", "MB", "GB"][unit]}`;
}

/** The bar above the time line; returns what brings it up to date. */
function liveBar(root, model, replay) {
  const [bar, stop, text] = ["live", "stop", "pace"].map((name) => root.querySelector(`.mp-${name}`));
  stop.addEventListener("click", () => {
    model.send({ stop: true });
    stop.disabled = true;
    stop.textContent = "Stopping…";
  });
  return (pace = "") => {
    const { total, size, tokenBytes } = replay.at(replay.last), live = model.get("live");
    const used = Math.round(replay.usage[replay.last] * total.device), block = size * tokenBytes;
    bar.hidden = !live;
    stop.hidden = live !== "running";
    text.textContent = stop.hidden ? live : [`live, step ${replay.last}`,
      `${used} of ${total.device} blocks in use (${Math.round(100 * replay.usage[replay.last])} %), `
      + `${bytes(used * block)} of ${bytes(total.device * block)}`, ...(pace ? [pace] : [])].join(" · ");
  };
}
