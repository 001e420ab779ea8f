// Small things that every part of the page needs.

export const $ = (id) => document.getElementById(id);

export function toast(text) {
  $("toast").textContent = text;
  $("toast").classList.add("show");
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => $("toast").classList.remove("show"), 3200);
}

export function showState(state, text) {
  $("state").dataset.state = state;
  $("state").textContent = text;
}

/** Marks one of a group of radios, or none. */
export function check(group, chosen) {
  for (const item of group.children) {
    item.ariaChecked = String(item === chosen);
    item.tabIndex = item === chosen ? 0 : -1;
  }
}

/** Arrow keys move inside a group of tabs or radios. */
export function roving(group) {
  group.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    const items = [...group.children].filter((c) => !c.hidden), next = items[(items.indexOf(document.activeElement) + by + items.length) % items.length];
    next.focus();
    next.click();
  });
}
