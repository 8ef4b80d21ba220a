// What minipaged.replay.MemoryState does, in the browser, so that scrubbing needs no kernel.
// A trace arrives in pieces {texts, first, steps}; steps[i] lists events of iteration first + i as [kind, ...fields]
// (views/html.py).
// A block is named by its place, "device 7" or "host 7".

const KEYFRAME = 32; // steps between two saved states: from one of them, any step is at most so many away

/** A piece, from zlib-compressed JSON. */
async function unpack(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

/** A … Z, AA, AB, …: the name of a request. */
function letters(number) {
  return (number > 25 ? letters(Math.floor(number / 26) - 1) : "") + String.fromCharCode(65 + (number % 26));
}

/** The whole memory at one moment. What the maps hold is replaced, never changed, so that a copy of them is enough. */
class State {
  constructor(size, device, host, model, tokenBytes) {
    this.size = size;            // slots of a block
    this.tokenBytes = tokenBytes; // keys and values of a token, in all layers
    this.total = { device, host };
    this.tables = new Map();     // sequence -> block numbers, in logical order
    this.stored = new Map();     // sequence -> slots of its table that hold keys and values
    this.length = new Map();     // sequence that has not ended -> its tokens, also those not stored yet
    this.status = new Map();     // request -> "waiting", "running" or "swapped"
    this.family = new Map();     // request -> sequences it has had so far
    this.swapped = new Map();    // sequence whose table names host blocks -> true
    this.aborted = new Map();    // request -> true; a sequence that outlives its request is a registered prefix
    // Sequence -> {request, index, prompt, tokens}. Tokens are only ever added, and the same ones however often an
    // event is replayed, so all states share these; each goes by its own `length`.
    this.about = new Map();
  }

  clone() {
    const copy = Object.assign(new State(), this);
    for (const [name, facts] of Object.entries(this)) if (facts instanceof Map) copy[name] = new Map(facts);
    copy.about = this.about;
    return copy;
  }

  place(seq, logical) { return `${this.swapped.has(seq) ? "host" : "device"} ${this.tables.get(seq)[logical]}`; }
  filled(seq, logical) { return Math.min(Math.max(this.stored.get(seq) - logical * this.size, 0), this.size); }

  /** A, B, … by request; A1, A2, … once it has had several sequences. */
  name(seq) {
    const { request, index } = this.about.get(seq);
    return letters(request) + (this.family.get(request) > 1 ? index : "");
  }

  /** Sequences that have not ended, by queue. */
  queues() {
    const found = { running: [], swapped: [], prefix: [], waiting: [] };
    for (const seq of this.length.keys()) {
      const { request } = this.about.get(seq);
      if (this.swapped.has(seq)) found.swapped.push(seq);
      else if (this.tables.has(seq)) found[this.aborted.has(request) ? "prefix" : "running"].push(seq);
      else if (this.status.get(request) === "waiting") found.waiting.push(seq);
    }
    return found;
  }

  /** Place -> its readers, as [sequence, logical block]; how many they are is the block's reference count. */
  readers() {
    const found = new Map();
    for (const [seq, blocks] of this.tables) {
      for (const logical of blocks.keys()) {
        const place = this.place(seq, logical);
        if (found.has(place)) found.get(place).push([seq, logical]); else found.set(place, [[seq, logical]]);
      }
    }
    return found;
  }

  begins(request, seq, tokens, prompt) {
    const index = (this.family.get(request) ?? 0) + 1;
    this.family.set(request, index);
    this.length.set(seq, tokens.length);
    if (!this.about.has(seq)) this.about.set(seq, { request, index, prompt, tokens });
  }

  move(request, pairs, status) {
    const moved = new Map(pairs);
    for (const [seq, blocks] of this.tables) {
      if (this.about.get(seq).request !== request) continue;
      this.tables.set(seq, blocks.map((block) => moved.get(block)));
      if (status === "swapped") this.swapped.set(seq, true); else this.swapped.delete(seq);
    }
    this.status.set(request, status);
  }

  // ---- one method per kind of event, with its fields ----
  add(request, seq, texts) { this.begins(request, seq, texts, texts.length); this.status.set(request, "waiting"); }
  admit(request) { this.status.set(request, "running"); }
  allocate(seq, logical, block) {
    this.tables.set(seq, [...this.tables.get(seq) ?? [], block]);
    if (!this.stored.has(seq)) this.stored.set(seq, 0);
  }
  share(...fields) { this.allocate(...fields); }
  fork(request, parent, seq) {
    const { tokens, prompt } = this.about.get(parent);
    this.begins(request, seq, tokens.slice(0, this.length.get(parent)), prompt);
    this.stored.set(seq, this.stored.get(parent));
  }
  copy(seq, logical, src, dst) { this.tables.set(seq, this.tables.get(seq).with(logical, dst)); }
  write(seq, start, end) { this.stored.set(seq, end); }
  sample(seq, text) {
    const length = this.length.get(seq);
    this.about.get(seq).tokens[length] = text;
    this.length.set(seq, length + 1);
  }
  swap_out(request, pairs) { this.move(request, pairs, "swapped"); }
  swap_in(request, pairs) { this.move(request, pairs, "running"); }
  preempt(request, why, how) { if (how === "recompute") this.status.set(request, "waiting"); }
  free(seq) { for (const facts of [this.tables, this.stored, this.swapped]) facts.delete(seq); }
  finish(request, seq, reason) {
    for (const facts of [this.length, this.stored]) facts.delete(seq);
    if (reason === "abort") this.aborted.set(request, true);
  }
}

/** Any step of a trace, quickly, and what is known of all steps. */
class Replay {
  constructor(trace) {
    Object.assign(this, { texts: [], steps: [], last: -1, keyframes: [], state: null });
    this.history = new Map(); // place -> [[step, event], …] that touched it
    this.jumps = { copy: [], preempt: [], swap: [] };
    this.usage = [];          // per step, the share of the device pool in use
    this.extend(trace);
  }

  /** Append what happened next: more of the last step, and further steps. */
  extend({ texts, first, steps }) {
    this.texts.push(...texts);
    if (this.last >= 0) this.at(this.last);
    steps.forEach((events, i) => {
      const step = first + i;
      this.play(events, (event) => this.note(step, event));
      (this.steps[step] ??= []).push(...events);
      this.last = this.state.step = step;
      if (step % KEYFRAME === 0) this.keyframes[step / KEYFRAME] = this.state.clone();
      const used = [...this.state.readers().keys()].filter((place) => place.startsWith("device"));
      this.usage[step] = used.length / Math.max(this.state.total.device, 1);
    });
  }

  /** The state after a step; the next call changes it. */
  at(step) {
    const frame = Math.floor(step / KEYFRAME);
    if (this.state.step > step || this.state.step < frame * KEYFRAME) this.state = this.keyframes[frame].clone();
    while (this.state.step < step) {
      this.play(this.steps[this.state.step + 1]);
      this.state.step += 1;
    }
    return this.state;
  }

  play(events, before) {
    for (const event of events) {
      before?.(event);
      const [kind, ...fields] = event;
      if (kind === "add") fields[2] = fields[2].map((text) => this.texts[text]);
      if (kind === "sample") fields[1] = this.texts[fields[1]];
      if (kind === "start") this.state = new State(...fields);
      else this.state[kind](...fields);
    }
  }

  note(step, event) {
    const [kind, who, second, third, fourth] = event, size = this.state?.size;
    const touch = (place) => {
      if (!this.history.has(place)) this.history.set(place, []);
      this.history.get(place).push([step, event]);
    };
    if (kind === "allocate" || kind === "share") touch(`device ${third}`);
    if (kind === "copy") [third, fourth].forEach((block) => touch(`device ${block}`));
    if (kind === "free") second.forEach((block) => touch(`${third ? "host" : "device"} ${block}`));
    if (kind === "swap_out") second.forEach(([a, b]) => { touch(`device ${a}`); touch(`host ${b}`); });
    if (kind === "swap_in") second.forEach(([a, b]) => { touch(`host ${a}`); touch(`device ${b}`); });
    if (kind === "write") {
      for (let at = Math.floor(second / size); at * size < third; at++) touch(this.state.place(who, at));
    }
    const steps = this.jumps[kind.startsWith("swap") ? "swap" : kind];
    if (steps && steps.at(-1) !== step) steps.push(step);
  }
}
