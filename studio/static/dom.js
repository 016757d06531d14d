// Elements from names, settings and children. Text is always text: nothing here reads markup.

/** Return an element. Settings that begin with "on" are listeners, others are properties, or attributes with a dash. */
export function element(name, settings = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(settings)) {
    if (value === undefined || value === null) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "class") made.className = value;
    else if (key === "role" || key === "for" || key.includes("-")) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Return a function that calls `action` when it has not been called for `wait` milliseconds. */
export function later(action, wait) {
  let timer = 0;
  const call = (...values) => {
    clearTimeout(timer);
    timer = setTimeout(action, wait, ...values);
  };
  call.cancel = () => clearTimeout(timer);
  return call;
}

/** Return a button. */
export function button(label, action, settings = {}) {
  return element("button", { type: "button", onclick: action, ...settings }, label);
}

export const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
