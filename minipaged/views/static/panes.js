// What is seen of a trace, behind one tab each. A file that draws a view adds it to PANES, and html.py puts it after
// this one. `create(panel, view)` fills a panel once and returns {draw(now), tell(thing)}: draw is called for each step
// while the tab is open, tell says what is known of a thing that was chosen in it, or null if it is not its own.

const PANES = {};

/** How many of a step's events come before its new tokens; as until_run in replay.py. */
function untilRun(events) {
  const at = events.findIndex(([kind]) => ["fork", "sample", "finish"].includes(kind));
  if (at < 0) return events.length;
  const [before, [kind, , ended]] = [events[at - 1], events[at]]; // who ends has given up its blocks just before
  return kind === "finish" && before?.[0] === "free" && before[1] === ended ? at - 1 : at;
}

/** Put the view's panes behind tabs, the first of which is its own body. */
function tabs(root, model, view, memory) {
  const list = root.querySelector(".mp-tabs"), body = root.querySelector(".mp-body"), panes = {};
  const choices = Object.entries({ memory: { label: "memory" }, ...PANES });
  choices.forEach(([name, { label }], i) => {
    const panel = name === "memory" ? body : make("div", { class: `mp-pane mp-${name}` });
    const title = `${label} (${i + 1})`;
    const tab = make("button", { role: "tab", "data-pane": name, title }, label);
    for (const [key, value] of [["role", "tabpanel"], ["aria-label", label]]) panel.setAttribute(key, value);
    if (panel !== body) body.after(panel);
    list.append(tab);
    panes[name] = { tab, panel, drawer: name === "memory" ? { draw: memory } : null };
  });
  const open = () => (panes[model.get("pane")] ? model.get("pane") : "memory");
  function choose(name) {
    const { panel, tab } = panes[open()], focused = document.activeElement;
    const inside = panel.contains(focused) || focused === tab;
    model.set("pane", name); // this calls paint
    model.save_changes();
    if (inside) panes[name].tab.focus(); // what had the focus is hidden
  }
  list.addEventListener("click", (event) => event.target.dataset.pane && choose(event.target.dataset.pane));
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], names = choices.map(([name]) => name);
    if (step) choose(names.at((names.indexOf(open()) + step) % names.length));
  });
  function draw(now) {
    for (const [name, { tab, panel }] of Object.entries(panes)) {
      panel.hidden = name !== open();
      tab.setAttribute("aria-selected", name === open());
      tab.tabIndex = name === open() ? 0 : -1;
    }
    const pane = panes[root.dataset.pane = open()];
    pane.drawer ??= PANES[open()].create(pane.panel, view);
    pane.drawer.draw(now);
  }
  const tell = (thing) => panes[open()].drawer?.tell?.(thing) ?? null;
  const number = (digit) => { if (choices[digit - 1]) choose(choices[digit - 1][0]); };
  return { choose, draw, number, open, tell };
}
