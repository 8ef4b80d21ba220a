// Draws one step of a Replay and lets one step, jump and ask. html.py puts the other files before this, and FIXED, the
// parts that no trace changes (microscope.html). What comes from a trace becomes text or an attribute, never markup.

const PALETTE = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442"]; // as in canvas.py
const SLOTS_PER_ROW = 4, MAX_ROWS = 48;    // beyond so many rows of slots, blocks are drawn as small cells
const ALL = 512;                           // of a bigger pool only blocks that are ever used are drawn
const MAX_TOKENS = 480, MAX_HISTORY = 40, MAX_ARROWS = 48, MAX_RUNS = 8, SYNC_MS = 300;
const QUEUES = { running: "running", swapped: "swapped out", prefix: "kept prefixes", waiting: "waiting" };
const LABELS = { ...QUEUES, device: "physical blocks", host: "host blocks" };

const colour = (seq) => PALETTE[seq % PALETTE.length];
const called = (place) => place.replace("device", "block").replace("host", "host block");

function render({ model, el, feed = new Feed() }) {
  if (model.get("other")?.byteLength) return renderPair({ model, el });
  // Without the attribute JupyterLab would take c, s and the arrows for shortcuts of its own.
  const root = make("div", { class: "mp", role: "group", "aria-label": "microscope" });
  root.dataset.lmSuppressShortcuts = "";
  el.append(root);
  let view = null, closed = false, work = Promise.resolve();
  const fail = (error) => {
    view?.stop();
    view = null;
    const message = `This trace cannot be shown: ${error.message}`;
    root.replaceChildren(make("p", { class: "mp-error", role: "alert" }, message));
  };
  const next = (task) => { work = work.then(() => closed || task()).catch(fail); }; // in the order in which they came
  const open = async () => {
    const trace = await unpack(model.get("data"));
    view?.stop();
    view = closed ? null : show(root, model, new Replay(trace), fail);
  };
  const reader = {
    take: ({ data, pace }) => next(async () => { const piece = await unpack(data); view?.extend(piece, pace); }),
    end: (whole) => next(() => (whole ? view?.end() : open())),
  };
  next(open);
  feed.pieces.forEach(reader.take);
  feed.views.add(reader);
  return () => { closed = true; feed.views.delete(reader); view?.stop(); };
}

/** Fill the view; returns what appends to it, what tells that nothing more will come, and what ends it. */
function show(root, model, replay, fail) {
  root.innerHTML = FIXED;
  const find = (name) => root.querySelector(`.mp-${name}`);
  const [slider, said, details, body] = ["slider", "said", "details", "body"].map(find);
  const boxes = {};
  for (const [name, label] of Object.entries(LABELS)) {
    boxes[name] = make("div", { class: `mp-box mp-${name}`, "data-panel": "", role: "group", "aria-label": label });
    boxes[name].append(make("h4"), make("div"));
    find(QUEUES[name] ? "left" : "right").append(boxes[name]);
  }
  const x = (step) => ((1000 * step) / Math.max(replay.last, 1)).toFixed(1); // on the time line
  let chosen = null, hovered = null;     // "device 7", "host 7" or "seq 3"
  let timer = null, sync = null, state = null, now = null;

  // ---- from step to step ----------------------------------------------------------------------------------------
  const here = () => Math.max(0, Math.min(replay.last, model.get("step")));
  function go(step) {
    if (model.get("live")) model.set("following", step >= replay.last);
    model.set("step", Math.max(0, Math.min(replay.last, step))); // this calls paint
    clearTimeout(sync);
    sync = setTimeout(() => model.save_changes(), SYNC_MS); // Python hears where one stops, not of each step of a run
  }
  function jump(kind, back) {
    const to = back ? replay.jumps[kind].findLast((s) => s < here()) : replay.jumps[kind].find((s) => s > here());
    if (to === undefined) said.textContent = `There is no ${back ? "earlier" : "later"} ${kind}.`; else go(to);
  }
  function play(on) {
    clearInterval(timer);
    if (on && here() === replay.last) go(0);
    const tick = () => (here() < replay.last ? go(here() + 1) : play(false));
    timer = on ? setInterval(tick, 1000 / find("speed").value) : null;
    find("play").textContent = on ? "Pause" : "Play";
    said.setAttribute("aria-live", on ? "off" : "polite"); // a screen reader could not keep up
  }
  const KEYS = { ".": () => go(here() + 1), ",": () => go(here() - 1), "<": () => go(0), ">": () => go(replay.last),
    " ": () => play(!timer), c: (back) => jump("copy", back), p: (back) => jump("preempt", back),
    s: (back) => jump("swap", back), 1: () => panes.number(1), 2: () => panes.number(2), 3: () => panes.number(3),
    escape: () => { chosen = hovered = null; paint(); } };
  root.addEventListener("keydown", (event) => {
    const at = event.target, key = event.key.toLowerCase(), thing = at.closest("[data-go]");
    event.stopPropagation();
    if (event.ctrlKey || event.metaKey || event.altKey || at.tagName === "SELECT") return;
    const along = thing?.closest("[data-steps]") && { arrowleft: -1, arrowright: 1 }[key];
    if (along) go(here() + along);
    else if (thing && key.startsWith("arrow")) walk(thing, key);
    else if (KEYS[key] && !(key === " " && at.tagName === "BUTTON")) KEYS[key](event.shiftKey);
    else return;
    event.preventDefault();
  });
  /** Arrow keys stay in a panel: sideways in its order, up and down in the same column. */
  function walk(from, key) {
    const all = [...from.closest("[data-panel]").querySelectorAll("[data-go]")], at = all.indexOf(from);
    const ahead = /left|up/.test(key) ? all.slice(0, at).reverse() : all.slice(at + 1);
    const left = (el) => el.getBoundingClientRect().x, below = (el) => Math.abs(left(el) - left(from)) < 9;
    (/left|right/.test(key) ? ahead[0] : ahead.find(below))?.focus();
  }
  const thingOf = (event) => event.target.closest("[data-go]")?.dataset.go ?? null;
  root.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.key) KEYS[button.dataset.key](event.shiftKey);
    else if (button?.dataset.step) go(Number(button.dataset.step));
    else if (details.contains(button) && button.dataset.go) {
      if (!now.places.has(button.dataset.go)) panes.choose("memory");
      now.places.get(button.dataset.go).focus();
    }
    else if (thingOf(event)) { chosen = thingOf(event); paint(); }
  });
  root.addEventListener("focusin", (event) => {
    if (!thingOf(event) || details.contains(event.target)) return;
    for (const el of event.target.closest("[data-panel]").querySelectorAll('[tabindex="0"]')) el.tabIndex = -1;
    event.target.tabIndex = 0; // Tab comes back to where one was in this panel
    chosen = thingOf(event);
    hovered = null;
    paint();
  });
  const hover = (event) => {
    if (details.contains(event.target) || thingOf(event) === hovered) return;
    hovered = event.type === "mouseleave" ? null : thingOf(event);
    paint();
  };
  root.addEventListener("mouseover", hover);
  root.addEventListener("mouseleave", hover);
  slider.addEventListener("input", () => go(Number(slider.value)));
  find("speed").addEventListener("change", () => play(Boolean(timer)));

  // ---- one step -------------------------------------------------------------------------------------------------
  function paint() { try { redraw(); } catch (error) { fail(error); } }
  function redraw() {
    const step = here(), moved = step !== now?.step, had = root.contains(document.activeElement);
    state = replay.at(step);
    const of = (kind) => replay.steps[step].filter((event) => event[0] === kind).map((event) => event.slice(1));
    now = { step, moved, of, queues: state.queues(), readers: state.readers(), marks: new Map(), places: new Map(),
      written: new Map(of("write").map(([seq, ...range]) => [seq, range])),
      moves: [...of("copy").map(([, , src, dst]) => [`device ${src}`, `device ${dst}`, "copy"]),
        ...of("swap_out").flatMap(([, pairs]) => pairs.map(([a, b]) => [`device ${a}`, `host ${b}`, "swap out"])),
        ...of("swap_in").flatMap(([, pairs]) => pairs.map(([a, b]) => [`host ${a}`, `device ${b}`, "swap in"]))],
      forks: of("fork").map(([, parent, child]) => [`seq ${parent}`, `seq ${child}`, "fork"]) };
    const freed = of("free").flatMap(([, blocks, host]) => blocks.map((b) => `${host ? "host" : "device"} ${b}`));
    for (const place of freed) if (!now.readers.has(place)) now.marks.set(place, "src");
    for (const [, , block] of of("allocate")) now.marks.set(`device ${block}`, "dst");
    for (const [from, to] of now.moves) now.marks.set(from, "src").set(to, "dst");
    const drawn = now.drawn = { device: blocksOf("device"), host: blocksOf("host") };
    now.detailed = (drawn.device.length + drawn.host.length) * Math.ceil(state.size / SLOTS_PER_ROW) <= MAX_ROWS;
    now.shown = hovered ?? chosen ?? (now.detailed ? null : `seq ${now.queues.running[0] ?? now.queues.swapped[0]}`);

    root.dataset.step = slider.value = step;
    root.classList.toggle("mp-detailed", now.detailed);
    say(find("step"), `step ${step} of ${replay.last}`);
    find("cursor").setAttribute("x", x(step));
    if (moved) said.textContent = told(state, of);
    panes.draw(now);
    state = replay.at(step); // a pane may have looked at other steps
    drawDetails();
    for (const panel of root.querySelectorAll("[data-panel]")) {
      if (!panel.querySelector('[tabindex="0"]')) panel.querySelector("[data-go]")?.setAttribute("tabindex", "0");
    }
    relink(moved); // at the end: it asks where things are, and the browser then lays the page out once
    if (had && !root.contains(document.activeElement)) slider.focus({ preventScroll: true }); // what had it is gone
  }

  function drawMemory({ drawn }) {
    for (const [queue, seqs] of Object.entries(now.queues)) {
      boxes[queue].hidden = !seqs.length && (queue === "prefix" || (queue === "swapped" && !replay.jumps.swap.length));
      say(boxes[queue].firstChild, `${QUEUES[queue]}: ${seqs.length}`);
      keyed(boxes[queue].lastChild, seqs, (seq) => seq, newSequence, (row, seq) => drawSequence(row, seq, queue));
    }
    for (const [pool, blocks] of Object.entries(drawn)) {
      const used = blocks.filter((block) => now.readers.has(`${pool} ${block}`)).length;
      const rest = state.total[pool] - blocks.length;
      boxes[pool].hidden = pool === "host" && !blocks.length;
      say(boxes[pool].firstChild, `${LABELS[pool]}: ${used} of ${state.total[pool]} in use, `
        + `${plural(state.size, "slot")} each${freeList(pool, blocks)}`
        + (rest ? `; ${rest} not drawn, as this trace never uses them` : ""));
      keyed(boxes[pool].lastChild, blocks, (block) => block, (block) => newBlock(`${pool} ${block}`), drawBlock);
    }
  }

  function blocksOf(pool) {
    const total = state.total[pool];
    if (pool === "device" && total <= ALL) return [...Array(total).keys()];
    const used = [...replay.history.keys()].map((place) => place.split(" ")).filter(([where]) => where === pool);
    return used.map(([, block]) => Number(block)).filter((block) => block < total).sort((a, b) => a - b);
  }

  /** The free blocks, in runs: "; free: 0–3, 7". */
  function freeList(pool, blocks) {
    const runs = [];
    for (const block of blocks.filter((block) => !now.readers.has(`${pool} ${block}`))) {
      if (runs.at(-1)?.[1] === block - 1) runs.at(-1)[1] = block; else runs.push([block, block]);
    }
    const shown = runs.slice(0, MAX_RUNS).map(([from, to]) => (from === to ? from : `${from}–${to}`));
    const more = runs.length > MAX_RUNS ? ["…"] : [];
    return pool === "device" ? `; free: ${[...shown, ...more].join(", ") || "none"}` : "";
  }

  const isShown = (...things) => things.includes(now.shown);
  const isFresh = (seq, at) => at >= now.written.get(seq)?.[0] && at < now.written.get(seq)[1];
  const styleOf = (seq, at) => (at < state.about.get(seq).prompt ? "mp-prompt" : "mp-output")
    + (isFresh(seq, at) ? " mp-fresh" : "");
  /** Readers may have come to different lengths; who has filled most knows all that is in the block. */
  const fullest = (readers) => readers.reduce((a, b) => (state.filled(...b) > state.filled(...a) ? b : a), readers[0]);

  function drawSlots(el, [seq, logical] = []) {
    const { size } = state, filled = seq === undefined ? 0 : state.filled(seq, logical), first = logical * size;
    const slots = Array.from({ length: size }, (_, i) => (i < filled
      ? [styleOf(seq, first + i), state.about.get(seq).tokens[first + i]] : ["mp-empty", ""]));
    if (!changed(el, seq, slots)) return;
    el.style.cssText = `--columns: ${Math.min(size, SLOTS_PER_ROW)}; --c: ${colour(seq)}`;
    el.replaceChildren(...slots.map(([kind, text]) => make("span", { class: `mp-slot ${kind}`, title: text }, text)));
  }

  const newSequence = (seq) => make("div", { class: "mp-seq", "data-seq": seq, style: `--c: ${colour(seq)}` },
    make("button", { class: "mp-name", tabindex: -1, "data-go": `seq ${seq}` }, make("b"), " ", make("span")),
    make("div", { class: "mp-table" }));
  const newSpan = (name) => make("span", { class: `mp-${name}` });
  const newEntry = () => make("button", { class: "mp-entry", tabindex: -1 },
    make("i"), ...["to", "filled", "slots"].map(newSpan));
  const newBlock = (place) => make("button", { class: "mp-block", tabindex: -1, "data-go": place },
    make("i", {}, place.split(" ")[1]), make("b"), ...["refs", "slots"].map(newSpan));

  function drawSequence(row, seq, queue) {
    const [head, table] = row.children, { request } = state.about.get(seq), blocks = state.tables.get(seq) ?? [];
    now.places.set(`seq ${seq}`, head);
    const mine = (kind) => now.of(kind).filter(([who]) => who === request);
    const news = [...mine("preempt").map(([, why, how]) => `preempted: ${how} (${why})`),
      ...mine("swap_in").map(() => "swapped in"), ...mine("admit").map(() => "admitted"),
      ...mine("fork").filter(([, , child]) => child === seq).map(([, parent]) => `fork of ${state.name(parent)}`)];
    const room = blocks.length ? ` in ${plural(blocks.length, "block")}` : "";
    const size = plural(state.length.get(seq), "token") + room;
    row.classList.toggle("mp-on", isShown(`seq ${seq}`, ...blocks.map((_, logical) => state.place(seq, logical))));
    if (changed(head, state.name(seq), size, news, news.length && now.step)) {
      say(head.firstChild, state.name(seq));
      head.childNodes[1].data = ` ${size}`;
      if (changed(head.lastChild, news, news.length && now.step)) { // what is new appears anew
        head.lastChild.replaceChildren(...news.map((text) => make("em", {}, text)));
      }
      head.setAttribute("aria-label", [`sequence ${state.name(seq)}, ${QUEUES[queue]}`, size, ...news].join(", "));
    }
    keyed(table, blocks, (_, logical) => logical, newEntry, (entry, block, logical) => {
      const place = state.place(seq, logical), filled = state.filled(seq, logical);
      now.places.set(`${seq}:${logical}`, entry);
      entry.classList.toggle("mp-on", isShown(place));
      if (now.detailed) drawSlots(entry.lastChild, [seq, logical]);
      if (!changed(entry, place, filled)) return;
      entry.dataset.go = place;
      [logical, block, filled].forEach((fact, i) => say(entry.children[i], fact));
      entry.ariaLabel = `logical block ${logical} in ${called(place)}, ${filled} of ${state.size} filled`;
    });
  }

  function drawBlock(cell) {
    const place = cell.dataset.go, mark = now.marks.get(place), readers = now.readers.get(place) ?? [];
    const refs = readers.length, reader = fullest(readers), filled = refs ? state.filled(...reader) : 0;
    const names = readers.map(([seq, logical]) => `${state.name(seq)}:${logical}`);
    const on = isShown(place, ...readers.map(([seq]) => `seq ${seq}`));
    const fresh = readers.some(([seq, logical]) => isFresh(seq, logical * state.size + state.filled(seq, logical) - 1));
    now.places.set(place, cell);
    if (now.detailed) drawSlots(cell.lastChild, reader);
    if (!changed(cell, names, filled, mark, on, fresh, now.detailed)) return;
    const flags = [!refs && "free", on && "on", mark, fresh && "fresh"].filter(Boolean);
    cell.className = ["mp-block", ...flags.map((flag) => `mp-${flag}`)].join(" ");
    if (changed(cell.style, refs && readers[0][0])) cell.style.cssText = refs ? `--c: ${colour(readers[0][0])}` : "";
    cell.style.backgroundSize = refs ? `${(100 * filled) / state.size}%` : ""; // --fill would reach all that is in it
    say(cell.children[1], now.detailed ? names.join(" ") || "free" : refs ? state.name(readers[0][0]) : "");
    say(cell.children[2], refs > 1 ? `×${refs}` : "");
    const use = `${filled} of ${state.size} slots filled, reference count ${refs}, read by ${names.join(" ")}`;
    const moved = { src: ", given up in this step", dst: ", taken in this step" }[mark] ?? "";
    cell.setAttribute("aria-label", `${called(place)}, ${refs ? use : "free"}${moved}`);
  }

  // ---- what one block or one sequence has to say ----------------------------------------------------------------
  function drawDetails() {
    const [kind, number] = (now.shown ?? "").split(" "), told = panes.tell(now.shown);
    if (told) details.replaceChildren(...told);
    else if (state.total[kind] !== undefined) blockDetails(now.shown, now.readers.get(now.shown) ?? []);
    else if (kind === "seq" && state.length.has(Number(number))) sequenceDetails(Number(number));
    else details.replaceChildren(make("p", {}, chosen ? "This sequence is not there in this step."
      : "Point at a block or a sequence, or go there with Tab and the arrow keys: what is known of it appears here."));
  }

  function blockDetails(place, readers) {
    const tokens = make("div", { class: "mp-slots" }), story = [];
    if (readers.length) drawSlots(tokens, fullest(readers));
    for (const [step, event] of (replay.history.get(place) ?? []).filter(([step]) => step <= now.step).reverse()) {
      const text = touched(state, place, event);
      if (story.at(-1)?.text === text) story.at(-1).from = step; else story.push({ text, from: step, to: step });
    }
    const who = readers.map(([seq, logical]) => `${state.name(seq)} as its logical block ${logical}`).join(", ");
    const past = make("p", {}, story.length ? "History, latest first: " : "Not used so far.");
    for (const { text, from, to } of story.slice(0, MAX_HISTORY)) {
      const when = `step ${from}${to > from ? `–${to}` : ""}`;
      past.append(make("button", { class: "mp-past", "data-step": from }, when), ` ${text}; `);
    }
    details.replaceChildren(make("h4", {}, `${called(place)}: ${who ? `read by ${who}` : "free"}`), tokens, past);
  }

  function sequenceDetails(seq) {
    const { tokens, prompt } = state.about.get(seq), length = state.length.get(seq);
    const stored = state.tables.has(seq) ? state.stored.get(seq) : 0, first = Math.max(0, length - MAX_TOKENS);
    const items = [];
    for (let at = first; at < length; at++) {
      const offset = at % state.size, place = at < stored ? state.place(seq, (at - offset) / state.size) : null;
      if (place && (at === first || !offset)) items.push({ key: `block ${at}`, place });
      items.push({ key: `${place ? "" : "new "}${at}`, at, offset, place });
    }
    let [head, text] = details.children;
    if (text?.seq !== seq) {
      [head, text] = [make("h4"), make("p", { class: "mp-text", style: `--c: ${colour(seq)}` })];
      text.seq = seq;
      details.replaceChildren(head, text);
    }
    const note = first ? `; the first ${first} are not shown` : "", size = plural(prompt, "prompt token");
    say(head, `sequence ${state.name(seq)}: ${size}, ${length - prompt} generated${note}`);
    const create = ({ at, place }) => (at === undefined ? make("small") : place
      ? make("button", { tabindex: -1 }, tokens[at]) : make("span", { class: "mp-token" }, tokens[at]));
    keyed(text, items, ({ key }) => key, create, (el, { at, offset, place }) => {
      if (at === undefined) return say(el, place.replace("device ", ""));
      if (!changed(el, place, place && styleOf(seq, at))) return;
      el.title = `position ${at}: ${place ? `${called(place)}, slot ${offset}` : "no keys and values yet"}`;
      if (place) [el.className, el.dataset.go] = [`mp-token ${styleOf(seq, at)}`, place];
    });
  }

  // ---- links from the block tables, and arrows along which something moved --------------------------------------
  function drawLinks(moved) {
    const origin = body.getBoundingClientRect();
    const aside = (i) => (now.detailed ? 0.95 - 0.014 * (i % 6) : 0.5); // beside the tokens, and one beside the other
    const spot = (name, side) => { // at the edge of its panel, if it is scrolled out of it
      const el = now.places.get(name), r = el.getBoundingClientRect();
      const panel = el.closest("[data-panel]").getBoundingClientRect();
      const y = Math.max(panel.top, Math.min(panel.bottom, r.top + r.height / 2));
      return [r.left + side * r.width - origin.left, y - origin.top].map(Math.round);
    };
    // All is measured before anything is drawn, so that the browser lays the page out only once.
    const links = [];
    for (const [place, readers] of now.readers) {
      for (const [seq, logical] of readers) {
        const on = isShown(`seq ${seq}`, place), name = `${seq}:${logical}`;
        if (now.detailed || on) links.push({ name, seq, on, a: spot(name, 1), b: spot(place, 0) });
      }
    }
    const forks = now.forks.filter(([from, to]) => now.places.has(from) && now.places.has(to)); // some end at once
    const moves = [...now.moves, ...forks].slice(0, MAX_ARROWS).map(([from, to, what], i) => (
      { a: spot(from, what === "fork" ? 1 : aside(i)), b: spot(to, what === "fork" ? 1 : aside(i)), what }));
    const [below, above] = [find("links"), find("moves")];
    keyed(below, links, ({ name }) => name, ({ seq }) => drawn("path", { style: `--c: ${colour(seq)}` }), (path, link) => {
      const { on, a: [x1, y1], b: [x2, y2] } = link, pull = Math.max(24, (x2 - x1) / 2);
      const d = `M${x1} ${y1}C${x1 + pull} ${y1} ${x2 - pull} ${y2} ${x2} ${y2}`;
      if (!changed(path, d, on, now.shown)) return;
      path.setAttribute("d", d);
      path.setAttribute("class", on ? "mp-on" : now.shown ? "mp-dim" : "");
    });
    const tips = [];
    above.replaceChildren();
    moves.forEach(({ a: [x1, y1], b: [x2, y2], what }, i) => {
      const [mx, my] = [(x1 + x2) / 2 + 30, (y1 + y2) / 2], turn = Math.atan2(y2 - my, x2 - mx);
      const end = `${x2 - 9 * Math.cos(turn)} ${y2 - 9 * Math.sin(turn)}`; // in the tip, which is 13 long
      for (const kind of ["mp-halo", "mp-move"]) {
        const travel = { class: `${kind}${moved ? " mp-moving" : ""}`, pathLength: 1 };
        draw(above, "path", { d: `M${x1} ${y1}Q${mx} ${my} ${end}`, ...travel });
      }
      const place = `translate(${x2} ${y2}) rotate(${(180 / Math.PI) * turn})`;
      tips.push(drawn("path", { d: "M0 0l-13 -6v12z", transform: place, class: `mp-tip${moved ? " mp-arriving" : ""}` }));
      const beside = { x: mx + (what === "fork" ? 17 : -24), y: my + 5 };
      if (what !== moves[i - 1]?.what) tips.push(drawn("text", beside, what));
    });
    above.append(...tips); // over all arrows
  }

  const relink = (moved = false) => { if (panes.open() === "memory") drawLinks(moved); };
  const sized = new ResizeObserver(() => relink());
  body.addEventListener("scroll", () => relink(), { capture: true, passive: true });
  const panes = tabs(root, model, { replay, go, choose: (name) => panes.choose(name) }, drawMemory);
  const showPace = liveBar(root, model, replay);

  function extend(piece, pace) {
    const latest = here() === replay.last; // not when someone looks at an earlier step
    const following = latest && model.get("live") === "running"; // in the end, Python says where to stay
    replay.extend(piece);
    drawStrip();
    showPace(pace);
    if (latest) now = null; // a step that goes on is drawn anew too
    if (following && here() !== replay.last) model.set("step", replay.last); else paint();
  }
  function drawStrip() {
    slider.max = replay.last;
    const usage = replay.usage.map((share, step) => `L${x(step)} ${(30 - 28 * share).toFixed(1)}`);
    find("usage").setAttribute("d", `M0 30${usage.join("")}V30z`);
    Object.entries(replay.jumps).forEach(([kind, steps], lane) => {
      const [tick, button] = [find(`tick.mp-${kind}`), find(`jump.mp-${kind}`)];
      tick.setAttribute("d", steps.map((step) => `M${x(step)} ${10 * lane}v9`).join(""));
      button.lastElementChild.textContent = ` ${steps.length}`;
      button.disabled = !steps.length;
    });
  }
  function stop() {
    play(false);
    clearTimeout(sync);
    sized.disconnect();
    for (const trait of ["step", "pane"]) model.off(`change:${trait}`, paint);
  }
  for (const trait of ["step", "pane"]) model.on(`change:${trait}`, paint);
  drawStrip();
  showPace();
  paint();
  sized.observe(body);
  return { extend, end: showPace, stop };
}

/** What an event did to a block, in words. */
function touched(state, place, [kind, who, ...f]) {
  const moved = () => f[0].find((pair) => place === `${kind === "swap_out" ? "device" : "host"} ${pair[0]}`
    || place === `${kind === "swap_out" ? "host" : "device"} ${pair[1]}`).join(" to ");
  return { allocate: () => `taken by ${state.name(who)} as logical block ${f[0]}`,
    share: () => `shared by ${state.name(who)} as logical block ${f[0]}`, write: () => `written by ${state.name(who)}`,
    copy: () => `copied from ${f[1]} to ${f[2]} for ${state.name(who)}`, free: () => `given up by ${state.name(who)}`,
    swap_out: () => `${letters(who)} swapped out, ${moved()}`,
    swap_in: () => `${letters(who)} swapped in, ${moved()}` }[kind]();
}

/** What happened in a step, in words: the rare and big first, and of many alike only their number. */
function told(state, of) {
  const name = (seq) => state.name(seq), written = of("write").reduce((sum, [, start, end]) => sum + end - start, 0);
  const say = { preempt: ([who, why, how]) => `${letters(who)} preempted: ${how} (${why})`,
    swap_out: ([who, pairs]) => `${letters(who)} swapped out: ${plural(pairs.length, "block")}`,
    swap_in: ([who, pairs]) => `${letters(who)} swapped in: ${plural(pairs.length, "block")}`,
    copy: ([seq, , src, dst]) => `${name(seq)} copies block ${src} to ${dst} before it writes`,
    fork: ([, parent, seq]) => `${name(seq)} forks from ${name(parent)}`, add: ([, seq]) => `${name(seq)} arrives`,
    admit: ([who]) => `${letters(who)} admitted`, finish: ([, seq, reason]) => `${name(seq)} ends (${reason})`,
    allocate: ([seq, , block]) => `block ${block} to ${name(seq)}` };
  const words = Object.entries(say).flatMap(([kind, one]) => (
    of(kind).length > 3 ? [`${of(kind).length} × ${kind}`] : of(kind).map(one)));
  return [...words, ...(written ? [`${plural(written, "slot")} written`] : [])].join(" · ") || "Nothing moved.";
}

/** anywidget calls this once for each model. */
export default () => {
  const feed = new Feed();
  return { initialize: ({ model }) => feed.listen(model), render: (view) => render({ ...view, feed }) };
};
