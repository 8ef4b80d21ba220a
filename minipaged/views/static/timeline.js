// The timeline: what each request does in each iteration, below the blocks in use while the model ran (§4.5). Of a long
// trace a window around the step is drawn, and under it how many requests do what in all of it.

const DOES = { P: "prefill", D: "decode", w: "waiting", S: "swapped out", R: "recomputed" }; // as in timeline.py
const WINDOW = 60, BINS = 500, LANE = 18;

/** What a trace says of each iteration; as Timeline in views/timeline.py. */
class Timeline {
  constructor(replay) {
    Object.assign(this, { replay, did: [], device: [], host: [], came: new Map(), began: new Map() });
  }

  /** Read the steps that are new; the last one read may have gone on since. */
  extend() {
    for (let step = Math.max(0, this.did.length - 1); step <= this.replay.last; step++) this.read(step);
  }

  read(step) {
    const events = this.replay.steps[step], state = this.replay.at(step), places = new Set(state.readers().keys());
    for (const [kind, , blocks, host] of events.slice(untilRun(events))) { // freed after the model had run
      if (kind === "free") for (const block of blocks) places.add(`${host ? "host" : "device"} ${block}`);
    }
    this.host[step] = [...places].filter((place) => place.startsWith("host")).length;
    this.device[step] = places.size - this.host[step];
    const ran = new Map(), did = new Map(), requestOf = (seq) => state.about.get(seq).request;
    for (const [kind, who] of events) {
      if (kind === "add") this.came.set(who, step);
      if (kind === "write") ran.set(requestOf(who), "D");
    }
    for (const [kind, who] of events) {
      if (kind !== "admit") continue;
      if (!this.began.has(who)) this.began.set(who, step);
      ran.set(who, this.began.get(who) < step ? "R" : "P"); // computes its prompt, for the first time or again
    }
    const resting = new Map([...state.length.keys()].map(requestOf)
      .map((request) => [request, { waiting: "w", swapped: "S" }[state.status.get(request)]]));
    for (const request of new Set([...resting.keys(), ...ran.keys()])) {
      const letter = resting.get(request) ?? ran.get(request);
      if (letter && this.came.get(request) < step) did.set(request, letter);
    }
    this.did[step] = did;
  }

  /** Spans of steps from `first` to `last` in which a request does the same, as [letter, from, to]. */
  spans(request, first, last) {
    const found = [];
    for (let step = first; step <= last; step++) {
      const letter = this.did[step].get(request), span = found.at(-1);
      if (span?.[0] === letter && span?.[2] === step - 1) span[2] = step;
      else if (letter) found.push([letter, step, step]);
    }
    return found;
  }
}

PANES.timeline = { label: "timeline", create: createTimeline };

function createTimeline(panel, { replay, go, choose }) {
  const line = new Timeline(replay);
  panel.innerHTML = `<p class="mp-hint"></p>
    <div class="mp-scroll"><div class="mp-inner">
      <div class="mp-chart" aria-hidden="true"><span></span><svg class="mp-steps" preserveAspectRatio="none">
        <path class="mp-used"/><path class="mp-full"/><path class="mp-hosted"/></svg></div>
      <div class="mp-rows" data-panel data-steps role="group" aria-label="requests"></div>
      <div class="mp-axis" aria-hidden="true"><span></span><div class="mp-steps"></div></div>
      <div class="mp-here"></div></div></div>
    <div class="mp-lanes" aria-hidden="true"><div></div><div class="mp-window"></div><div class="mp-now"></div></div>
    <p class="mp-keys"></p>`;
  const [hint, chart, rows, axis, at, lanes, keys] = ["hint", "chart", "rows", "axis", "here", "lanes", "keys"]
    .map((name) => panel.querySelector(`.mp-${name}`));
  for (const [letter, meaning] of Object.entries(DOES)) {
    keys.append(make("i", { class: `mp-did mp-${letter}` }, letter), ` ${meaning} `);
  }
  let first = 1, last = 1; // of the window

  /** The step over which something happened: of the window, or, in a lane, of the whole trace. */
  function meant(event) {
    const el = event.target.closest(".mp-steps, .mp-lane svg");
    if (!el) return null;
    const { left, width } = el.getBoundingClientRect();
    const [from, to] = el.closest(".mp-lane") ? [0, replay.last] : [first, last];
    return Math.min(to, from + Math.floor(((event.clientX - left) / width) * (to - from + 1)));
  }
  panel.addEventListener("click", (event) => {
    if (event.detail === 0 && event.target.closest(".mp-row")) choose("memory"); // a key
    else if (meant(event) !== null) go(meant(event));
  });
  panel.addEventListener("dblclick", (event) => { if (meant(event) !== null) choose("memory"); });

  function paint(now) {
    line.extend();
    const all = Math.max(1, replay.last), half = WINDOW / 2; // the window turns its pages by half of it
    const turned = half * Math.floor((now.step - 1) / half) - half / 2;
    first = Math.max(1, Math.min(all - WINDOW + 1, turned));
    last = Math.min(all, first + WINDOW - 1);
    line.did[last] ??= new Map(); // of a trace in which no iteration has begun
    if (changed(panel, first, last, all)) {
      panel.style.cssText = `--steps: ${last - first + 1}; --all: ${all + 1}; --first: ${first}`;
    }
    at.style.cssText = `--step: ${now.step - first}`; // not of the panel, all of which would be styled anew
    at.hidden = now.step < first; // before the first iteration
    lanes.lastChild.style.cssText = `--now: ${now.step}`;
    const hosted = line.host.some(Boolean) ? `; on the host (dashed) ${line.host[now.step]}` : "";
    hint.textContent = `Blocks in use while the model ran in step ${now.step}: ${line.device[now.step]} of `
      + `${replay.state.total.device}${hosted}. Click goes to a step; Enter or a double click shows its memory.`;
    const used = [line.device, line.host].map((numbers) => numbers.slice(first, last + 1));
    if (changed(chart, first, used)) drawChart(...used);
    if (changed(axis, first, last)) drawAxis();
    drawRows(now);
    lanes.hidden = all <= WINDOW;
    if (!lanes.hidden && changed(lanes, replay.last)) drawLanes();
  }

  function drawChart(device, host) {
    const total = replay.state.total.device, [label, svg] = chart.children, top = Math.max(total, ...line.host, 1);
    const y = (blocks) => (100 - (96 * blocks) / top).toFixed(2);
    const outline = (numbers) => numbers.map((blocks) => `V${y(blocks)}h1`).join("");
    label.textContent = `${total} blocks`;
    svg.setAttribute("viewBox", `0 0 ${device.length} 100`);
    const hosted = host.some(Boolean) ? `M0 100${outline(host)}` : "";
    [`M0 100${outline(device)}V100z`, `M0 ${y(total)}h${device.length}`, hosted]
      .forEach((d, i) => svg.children[i].setAttribute("d", d));
  }

  function drawAxis() {
    const count = last - first + 1, every = count > 30 ? 5 : count > 12 ? 2 : 1;
    const ticks = Array.from({ length: count }, (_, i) => first + i).filter((step) => step % every === 0);
    axis.lastChild.replaceChildren(...ticks.map((step) => make("span", { style: `--from: ${step - first}` }, step)));
  }

  function drawRows(now) {
    const requests = new Set(line.did.slice(first, last + 1).flatMap((did) => [...did.keys()]));
    const create = (request) => make("button", { class: "mp-row", tabindex: -1, "data-go": `request ${request}` },
      make("b", {}, letters(request)), make("span", { class: "mp-bars mp-steps" }));
    keyed(rows, [...requests].sort((a, b) => a - b), (request) => request, create, (row, request) => {
      const spans = line.spans(request, first, last), does = DOES[line.did[now.step]?.get(request)] ?? "not there";
      row.classList.toggle("mp-on", now.shown === row.dataset.go);
      row.ariaLabel = `request ${letters(request)}: ${does} in step ${now.step}`;
      if (!changed(row, first, last, spans)) return;
      const bar = ([letter, from, to]) => make("i", { class: `mp-did mp-${letter}`,
        title: `${DOES[letter]}, ${during(from, to)}`, style: `--from: ${from - first}; --for: ${to - from + 1}` }, letter);
      row.lastChild.replaceChildren(...spans.map(bar));
    });
    if (!changed(rows, first)) return; // else those that are there now come into sight
    const there = [...rows.children].find((row) => !row.ariaLabel.includes("not there"));
    panel.querySelector(".mp-scroll").scrollTop = there ? there.offsetTop - rows.offsetTop : 0;
  }

  /** How many requests do what, over the whole trace; of several steps in one bin, the most. */
  function drawLanes() {
    const wide = Math.ceil(line.did.length / BINS), lane = (letter) => {
      const counts = [];
      line.did.forEach((did, step) => {
        const bin = Math.floor(step / wide), here = [...did.values()].filter((one) => one === letter).length;
        counts[bin] = Math.max(counts[bin] ?? 0, here);
      });
      return [letter, counts, Math.max(...counts)];
    };
    lanes.firstChild.replaceChildren();
    for (const [letter, counts, most] of Object.keys(DOES).map(lane)) {
      if (!most) continue;
      const row = make("div", { class: "mp-lane" }, make("span", {}, `${DOES[letter]}, most ${most}`));
      draw(row, "svg", { viewBox: `0 0 ${line.did.length} 1`, preserveAspectRatio: "none" });
      const outline = counts.map((count) => `V${(1 - count / most).toFixed(3)}h${wide}`).join("");
      draw(row.lastChild, "path", { d: `M0 1${outline}V1z`, class: `mp-${letter}` });
      lanes.firstChild.append(row);
    }
  }

  /** All that one request did, from its arrival on. */
  function tell(thing) {
    const request = Number(thing?.match(/^request (\d+)$/)?.[1] ?? NaN);
    if (!line.came.has(request)) return null;
    const past = make("p", {}, `arrives after step ${line.came.get(request)}; `);
    for (const [letter, from, to] of line.spans(request, 0, replay.last)) {
      past.append(`${DOES[letter]} `, make("button", { class: "mp-past", "data-step": from }, during(from, to)), "; ");
    }
    return [make("h4", {}, `request ${letters(request)}`), past];
  }
  return { draw: paint, tell };
}

const during = (from, to) => (to > from ? `steps ${from}–${to}` : `step ${from}`);
