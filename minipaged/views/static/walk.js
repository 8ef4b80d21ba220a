// Draws one query's walk over its block table (views/walk.py), entry by entry. Every number comes from the record but
// the weights so far, exp(score - m) / l. walk_widget.py puts dom.js before this, and FIXED, the parts that no walk
// changes. Token texts become text, never markup.

const LABELLED = 24;   // tokens up to which each weight has its token and its percentage below it
const COLUMNS = 96;    // tokens up to which each weight is an element of its own; of more, a drawing of bars
const HEAVIEST = 8;    // tokens that are named then
const SYNC_MS = 300;

const number = (value) => value.toFixed(2).replace(/^-0\.00$/, "0.00");
const percent = (value) => `${(100 * value).toFixed(1)}%`;

function render({ model, el }) {
  const walk = model.get("walk"), last = walk.entries.length - 1;
  const root = make("div", { class: "mp wk", role: "group", "aria-label": "attention walk" });
  root.dataset.lmSuppressShortcuts = ""; // else JupyterLab would take the arrows for its own
  root.innerHTML = FIXED;
  el.append(root);
  const find = (selector) => root.querySelector(selector);
  const slider = find(".mp-slider"), said = find(".wk-said");
  let timer = null, sync = null;

  // ---- from entry to entry --------------------------------------------------------------------------------------
  const here = () => Math.max(0, Math.min(last, model.get("at")));
  function go(at) {
    model.set("at", Math.max(0, Math.min(last, at))); // this calls paint
    clearTimeout(sync);
    sync = setTimeout(() => model.save_changes(), SYNC_MS); // Python hears where one stops
  }
  function play(on) {
    clearInterval(timer);
    if (on && here() === last) go(0);
    const tick = () => (here() < last ? go(here() + 1) : play(false));
    timer = on ? setInterval(tick, 1000 / find(".mp-speed").value) : null;
    find(".mp-play").textContent = on ? "Pause" : "Play";
    said.setAttribute("aria-live", on ? "off" : "polite"); // a screen reader could not keep up
  }
  const KEYS = { ".": () => go(here() + 1), ",": () => go(here() - 1), "<": () => go(0), ">": () => go(last),
    " ": () => play(!timer) };
  root.addEventListener("keydown", (event) => {
    const at = event.target, step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    event.stopPropagation();
    if (event.ctrlKey || event.metaKey || event.altKey || at.tagName === "SELECT") return;
    if (step && at.dataset.entry) entries[Math.max(0, Math.min(last, Number(at.dataset.entry) + step))].focus();
    else if (KEYS[event.key] && !(event.key === " " && at.tagName === "BUTTON")) KEYS[event.key]();
    else return;
    event.preventDefault();
  });
  root.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button?.dataset.key) KEYS[button.dataset.key]();
    else if (button?.dataset.entry) go(Number(button.dataset.entry));
  });
  root.addEventListener("focusin", ({ target }) => { if (target.dataset.entry) go(Number(target.dataset.entry)); });
  slider.addEventListener("input", () => go(Number(slider.value)));
  find(".mp-speed").addEventListener("change", () => play(Boolean(timer)));

  // ---- the picture ----------------------------------------------------------------------------------------------
  const entries = walk.entries.map((entry, i) => make("button", { class: "wk-entry", "data-entry": i, tabindex: -1 },
    `${i} → block ${entry.block}`));
  find(".wk-table").append(...entries);
  if (walk.later.length) {
    find(".wk-table").append(make("span", { class: "wk-later" }, `${walk.later.length} more, after the query: not read`));
  }
  find(".wk-title").textContent = walk.title;
  slider.max = last;
  const longest = Math.max(...walk.entries.flatMap((entry) => entry.weighted.map(Math.abs))) || 1;

  function paint() {
    const at = here(), entry = walk.entries[at], before = walk.entries[at - 1];
    root.dataset.at = slider.value = at;
    find(".mp-step").textContent = `entry ${at} of 0–${last}`;
    entries.forEach((button, i) => {
      button.classList.toggle("wk-read", i < at);
      button.classList.toggle("wk-here", i === at);
      button.tabIndex = i === at ? 0 : -1;
      button.ariaLabel = `entry ${i}, block ${walk.entries[i].block}, ${i < at ? "read" : i === at ? "read now" : "not read yet"}`;
    });
    entries[at].scrollIntoView({ block: "nearest" });
    said.textContent = told(walk, at);
    drawSlots(at, entry);
    drawSums(entry, before);
    drawWeights(at, entry);
    find(".wk-end").replaceChildren(...(at < last ? [] : ["output = accumulator / l · ", make("b", {}, walk.verdict)]));
  }

  function drawSlots(at, entry) {
    find(".wk-slots caption").textContent = `physical block ${entry.block}: ${plural(walk.size, "slot")}`;
    const largest = Math.max(...entry.scores);
    find(".wk-slots tbody").replaceChildren(...Array.from({ length: walk.size }, (_, i) => {
      const token = entry.tokens[i] ?? "", score = entry.scores[i];
      if (score === undefined) {
        const cells = [i, token, token ? "masked" : "empty", "", ""].map((text) => make("td", {}, text));
        return make("tr", { class: "wk-unseen" }, ...cells);
      }
      const share = Math.exp(score - entry.largest);
      return make("tr", score === largest ? { class: "wk-largest" } : {}, make("td", {}, i), make("td", { title: token }, token),
        make("td", {}, number(score)), make("td", {}, number(share)),
        make("td", { class: "wk-share" }, make("i", { style: `width: ${100 * share}%` })));
    }));
  }

  function drawSums(entry, before) {
    const dash = "–", rows = [["largest m", before ? number(before.largest) : dash, dash, number(entry.largest)],
      ["sum l", before ? number(before.total) : "0.00",
        before ? `× ${number(entry.shrink)} = ${number(before.total * entry.shrink)}` : dash, number(entry.total)]];
    find(".wk-sums tbody").replaceChildren(...rows.map(([name, ...cells], i) => make("tr",
      i && before && entry.shrink < 1 ? { class: "wk-shrunk" } : {}, make("th", { scope: "row" }, name),
      ...cells.map((text) => make("td", {}, text)))));
    const picture = find(".wk-accumulator"), count = entry.weighted.length;
    picture.setAttribute("viewBox", `0 -50 ${10 * count} 100`);
    picture.setAttribute("aria-label", `accumulator of ${count} components, first ${entry.weighted.slice(0, 4).map(number).join(", ")}`);
    const bars = (values, width) => values.map((value, i) => (
      `M${10 * i + 5 - width / 2} 0h${width}v${(-49 * value / longest).toFixed(2)}h${-width}z`)).join("");
    find(".wk-kept").setAttribute("d", before ? bars(before.weighted.map((value) => value * entry.shrink), 9) : "");
    find(".wk-now").setAttribute("d", bars(entry.weighted, 4));
    find(".wk-zero").setAttribute("d", `M0 0h${10 * count}`);
    find(".wk-note").textContent = `accumulator, ${plural(count, "component")}: wide bars before, rescaled; narrow bars now`;
  }

  function drawWeights(at, entry) {
    const tokens = walk.entries.slice(0, at + 1).flatMap(({ tokens, scores }) => tokens.slice(0, scores.length));
    const weights = walk.entries.slice(0, at + 1).flatMap(({ scores }) => (
      scores.map((score) => Math.exp(score - entry.largest) / entry.total)));
    const all = find(".wk-weights"), top = Math.max(...weights);
    const order = weights.map((_, i) => i).sort((a, b) => weights[b] - weights[a]).slice(0, HEAVIEST);
    const heaviest = order.map((i) => `${i} ${tokens[i]} ${percent(weights[i])}`).join(" · ");
    all.setAttribute("aria-label", `weights of ${plural(weights.length, "token")}, the heaviest: ${heaviest}`);
    find(".wk-head").textContent = (at === last ? "weights a_ij = exp(score − m) / l" : "weights so far, exp(score − m) / l")
      + (weights.length > LABELLED ? `; the heaviest: ${heaviest}` : "");
    if (weights.length > COLUMNS) {
      const d = weights.map((weight, i) => `M${i} 100h1v${(-100 * weight / top).toFixed(2)}h-1z`).join("");
      const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      picture.setAttribute("viewBox", `0 0 ${weights.length} 100`);
      picture.setAttribute("preserveAspectRatio", "none");
      picture.append(document.createElementNS(picture.namespaceURI, "path"));
      picture.firstChild.setAttribute("d", d);
      all.replaceChildren(picture);
      return;
    }
    const room = weights.length > LABELLED ? 112 : 78, first = at * walk.size;
    all.replaceChildren(...weights.map((weight, i) => make("div", { title: `${i} ${tokens[i]} ${percent(weight)}`,
      class: (i % walk.size ? "" : "wk-first ") + (i >= first ? "wk-here" : "") },
      make("i", { style: `height: ${(room * weight) / top}px` }),
      ...(weights.length > LABELLED ? [] : [make("span", {}, tokens[i]), make("small", {}, percent(weight))]))));
  }

  model.on("change:at", paint);
  paint();
  return () => { play(false); clearTimeout(sync); model.off("change:at", paint); };
}

/** What reading an entry did, in words. */
function told(walk, at) {
  const entry = walk.entries[at], before = walk.entries[at - 1], own = Math.max(...entry.scores);
  const unseen = entry.tokens.length - entry.scores.length, empty = walk.size - entry.tokens.length;
  const rest = [...(unseen ? [`${plural(unseen, "slot")} after the query masked`] : []),
    ...(empty ? [`${plural(empty, "slot")} empty`] : [])].join(", ");
  const read = `Entry ${at} names physical block ${entry.block}${rest ? `, ${rest}` : ""}. `;
  if (!before) return `${read}Nothing was read before: m = ${number(entry.largest)}, and the sums begin.`;
  if (own <= before.largest) {
    return `${read}Its largest score, ${number(own)}, is not above m = ${number(before.largest)}: `
      + "l and the accumulator are added to as they are.";
  }
  return `${read}Its largest score, ${number(own)}, is above m = ${number(before.largest)}: l and the accumulator are `
    + `first multiplied with exp(${number(before.largest)} − ${number(own)}) = ${number(entry.shrink)}.`.replace("− -", "+ ");
}

export default { render };
