// Who shares which blocks (§4.4): the block tables as a tree, in which tables that begin alike have one branch; with
// what the choices at the end of the step set free. As in views/sharing.py.

const DETAILED = 28, SMALL = 8; // so many blocks of so many slots are drawn with their tokens

PANES.sharing = { label: "sharing", create: createSharing };

/** The tree after a step: {nodes, roots, entries, used}; a node is a block behind those before it in its tables. */
function treeOf(replay, now) {
  const events = replay.steps[now.step], of = (...kinds) => events.filter(([kind]) => kinds.includes(kind));
  const freed = events.slice(untilRun(events)).filter(([kind]) => kind === "free");
  const stored = new Map(replay.at(Math.max(now.step - 1, 0)).stored); // of those that ended; they may have written since
  for (const [, seq, , end] of of("write")) stored.set(seq, end);
  const state = replay.at(now.step), roots = new Map(), nodes = [];

  const marks = new Map([...of("allocate").map(([, , , block]) => [`device ${block}`, "new"]),
    ...of("copy").map(([, , , src, dst]) => [`device ${dst}`, `copy of ${src}`])]);
  const end = (seq) => [state.name(seq), ...of("fork").filter((fork) => fork[3] === seq)
    .map(([, , parent]) => `(fork of ${state.name(parent)})`), ...of("finish").filter((finish) => finish[2] === seq)
    .map(([, , , reason]) => `(${reason})`)].join(" ");
  function grow(seq, places, length) {
    let level = roots, node = null;
    places.forEach((place, logical) => {
      const first = logical * state.size, { tokens } = state.about.get(seq);
      const words = tokens.slice(first, Math.min(length, first + state.size));
      if (!level.has(place)) {
        const readers = now.readers.get(place)?.length ?? 0;
        const mark = readers ? marks.get(place) ?? "" : "freed";
        node = { place, readers, mark, words, seqs: [], ends: [], next: new Map() };
        level.set(place, node);
        nodes.push(node);
      }
      node = level.get(place);
      if (words.length > node.words.length) node.words = words; // who has filled most knows all that is in it
      node.seqs.push(seq);
      level = node.next;
    });
    node?.ends.push({ seq, text: end(seq) });
  }
  for (const [seq, blocks] of state.tables) grow(seq, blocks.map((_, i) => state.place(seq, i)), state.stored.get(seq));
  const born = new Set(of("fork").map(([, , , seq]) => seq)); // who also ended held nothing while the model ran
  for (const [, seq, blocks, host] of freed) {
    if (!state.tables.has(seq) && !born.has(seq)) grow(seq, blocks.map((block) => `${host ? "host" : "device"} ${block}`), stored.get(seq));
  }
  const onDevice = [...now.readers].filter(([place]) => place.startsWith("device"));
  const entries = onDevice.reduce((sum, [, readers]) => sum + readers.length, 0);
  return { nodes, roots: [...roots.values()], entries, used: onDevice.length };
}

/** Blocks one behind the other that no table ends in or leaves between, and what follows them. */
function runOf(node) {
  const run = [node];
  while (run.at(-1).next.size === 1 && !run.at(-1).ends.length) run.push(...run.at(-1).next.values());
  return { run, ends: run.at(-1).ends, next: [...run.at(-1).next.values()] };
}

/** The measure of §6.3: blocks saved by sharing, over the blocks without sharing. */
function saving({ entries, used }) {
  if (!entries) return "no block in use";
  const saved = entries - used, share = Math.floor((200 * saved + entries) / (2 * entries));
  return `${used} blocks in use, ${entries} without sharing; sharing saves ${saved} of ${entries} (${share}%)`;
}

function createSharing(panel, { replay }) {
  const hint = make("p", { class: "mp-hint mp-saving" });
  const tree = make("div", { class: "mp-tree", "data-panel": "", role: "group", "aria-label": "blocks as a tree" });
  panel.append(hint, tree);
  let now = null, detailed = false;

  const newBranch = ({ run }) => (run ? make("div", { class: "mp-branch" }, make("div", { class: "mp-run" }),
    make("div", { class: "mp-kids" })) : make("div", { class: "mp-ends" }));
  const newNode = ({ place }) => make("button", { class: "mp-node", tabindex: -1, "data-go": place },
    make("i"), make("b"), make("span", { class: "mp-slots" }));
  const newEnd = ({ seq }) => make("button", { class: "mp-end", tabindex: -1, "data-go": `seq ${seq}` });

  /** What follows a block: first the sequences whose tables end there. */
  function drawKids(kids, ends, next) {
    const items = [...(ends.length ? [{ key: "ends", ends }] : []),
      ...next.map((node) => ({ key: node.place, ...runOf(node) }))];
    keyed(kids, items, ({ key }) => key, newBranch, (el, item) => {
      if (item.key === "ends") return keyed(el, ends, ({ seq }) => seq, newEnd, drawEnd);
      keyed(el.firstChild, item.run, ({ place }) => place, newNode, drawNode);
      return drawKids(el.lastChild, item.ends, item.next);
    });
  }

  function drawNode(el, { place, readers, mark, words, seqs }) {
    const on = now.shown === place || seqs.some((seq) => now.shown === `seq ${seq}`);
    now.places.set(place, el);
    if (!changed(el, readers, mark, words, on, detailed)) return;
    const look = [`r${Math.min(readers, 4)}`, mark === "freed" ? "freed" : mark && "taken", on && "on"].filter(Boolean);
    el.className = ["mp-node", ...look.map((name) => `mp-${name}`)].join(" ");
    const [title, count] = [detailed ? called(place) : place.replace("device ", ""), readers ? `×${readers}` : "freed"];
    say(el.children[0], title);
    say(el.children[1], detailed && readers ? `${count} ${mark}` : count);
    if (changed(el.children[2], detailed && words)) {
      const slots = (detailed ? words : []).map((word) => make("span", { class: "mp-slot", title: word }, word));
      el.children[2].replaceChildren(...slots);
    }
    el.ariaLabel = [called(place), readers ? `reference count ${readers}` : "", mark, words.join(" ")].filter(Boolean)
      .join(", ");
  }

  function drawEnd(el, { seq, text }) {
    el.classList.toggle("mp-on", now.shown === `seq ${seq}`);
    if (!changed(el, text)) return;
    el.style.cssText = `--c: ${colour(seq)}`;
    el.textContent = text;
    el.ariaLabel = `table of ${text} ends here`;
  }

  function paint(next) {
    const found = treeOf(replay, next);
    now = next;
    detailed = replay.state.size <= SMALL && found.nodes.length <= DETAILED;
    panel.classList.toggle("mp-wordy", detailed);
    hint.textContent = `After step ${now.step}: ${saving(found)}`;
    drawKids(tree, [], found.roots);
  }
  return { draw: paint };
}
