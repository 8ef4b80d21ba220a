// Two traces side by side: each under a microscope of its own, and both at the same step and view, as they have one
// model. The first step in which different things happened is marked. As in views/compare.py.

/** The first step in which the two differ in what happened; null if there is none. Sizes of pools do not count. */
function firstDifference(a, b) {
  const happened = ({ texts, steps }, step) => JSON.stringify((steps[step] ?? []).filter(([kind]) => kind !== "start")
    .map(([kind, ...f]) => (kind === "add" ? [kind, f[0], f[1], f[2].map((text) => texts[text])]
      : kind === "sample" ? [kind, f[0], texts[f[1]]] : [kind, ...f])));
  for (let step = 0; step <= Math.max(a.last, b.last); step++) {
    if (happened(a, step) !== happened(b, step) || (step > a.last) !== (step > b.last)) return step;
  }
  return null;
}

function verdict(first, step) {
  if (first === null) return "The two traces are the same in every step.";
  if (step < first) return `The same so far; the first difference is in step ${first}.`;
  return step === first ? `The first difference is in this step, ${first}.` : `Different since step ${first}.`;
}

function renderPair({ model, el }) {
  const names = model.get("names"), said = make("span", { role: "status" }), stops = [];
  const button = make("button", { title: "first difference (d)" }, "first difference");
  const root = make("div", { class: "mp-pair", role: "group", "aria-label": `${names.join(" and ")}, side by side` },
    make("p", { class: "mp mp-verdict" }, button, " ", said));
  const halves = names.map((name) => make("div", { class: "mp", role: "group", "aria-label": name }));
  halves.forEach((half, i) => root.append(make("section", {}, make("h3", { class: "mp" }, names[i]), half)));
  root.dataset.lmSuppressShortcuts = "";
  el.append(root);
  let closed = false;
  const fail = (half) => (error) => half.replaceChildren(make("p", { class: "mp-error", role: "alert" },
    `This trace cannot be shown: ${error.message}`));

  Promise.all([unpack(model.get("data")), unpack(model.get("other"))]).then((traces) => {
    if (closed) return;
    const replays = traces.map((trace) => new Replay(trace)), [a, b] = replays;
    const first = firstDifference(a, b), last = Math.max(a.last, b.last);
    const rest = ({ last: end }) => ({ texts: [], first: end + 1, steps: Array.from({ length: last - end }, () => []) });
    for (const replay of replays) replay.extend(rest(replay)); // nothing happens after its end
    replays.forEach((replay, i) => stops.push(show(halves[i], model, replay, fail(halves[i])).stop));
    const tell = () => { said.textContent = verdict(first, model.get("step")); };
    const jump = () => { if (first !== null) { model.set("step", first); model.save_changes(); } };
    button.disabled = first === null;
    button.addEventListener("click", jump);
    root.addEventListener("keydown", (event) => {
      if (event.key !== "d" || event.ctrlKey || event.metaKey || event.altKey) return;
      event.stopPropagation();
      jump();
    }, true);
    for (const half of first === null ? [] : halves) {
      draw(half.querySelector(".mp-strip"), "path", { class: "mp-tick mp-differ", d: `M${(1000 * first) / last} 0v30` });
    }
    model.on("change:step", tell);
    stops.push(() => model.off("change:step", tell));
    tell();
  }).catch(fail(root));
  return () => { closed = true; stops.forEach((stop) => stop()); };
}
