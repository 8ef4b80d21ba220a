// What all views draw with. Texts become text nodes or attributes, never markup.

function make(tag, attributes = {}, ...children) {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) el.setAttribute(name, value);
  el.append(...children);
  return el;
}

function drawn(tag, attributes, text = "") {
  const el = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) el.setAttribute(name, value);
  el.textContent = text;
  return el;
}

const draw = (parent, ...what) => parent.append(drawn(...what));

/** Make the children of an element those of the items, in order; one that is there is kept, and moved if it must be. */
function keyed(parent, items, keyOf, create, update) {
  const before = parent.kids ?? new Map(), was = new Map([...before.values()].map((el, index) => [el, index]));
  parent.kids = new Map(items.map((item, index) => [keyOf(item, index), item]));
  for (const [key, el] of before) if (!parent.kids.has(key)) el.remove();
  let next = parent.firstChild, last = -1, index = 0;
  for (const [key, item] of parent.kids) {
    const el = before.get(key) ?? create(item);
    parent.kids.set(key, el);
    if (was.get(el) > last) [last, next] = [was.get(el), el.nextSibling]; // what it leaves behind is moved in its turn
    else parent.insertBefore(el, next);
    update(el, item, index++);
  }
}

/** Whether an element must be drawn anew; in a step, most are as they were. */
function changed(el, ...facts) {
  const now = JSON.stringify(facts), is = now !== el.facts;
  el.facts = now;
  return is;
}

/** Give an element its text, in the text node that it has: a new one would cost the browser several times as much. */
function say(el, text) {
  if (!el.firstChild) el.append(text);
  else if (el.firstChild.data !== String(text)) el.firstChild.data = text;
}

const plural = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
