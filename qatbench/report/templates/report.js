"use strict";

// Sorting: headings become buttons; numbers go by data-value, what is not known stays last.
const column = (row, index) => row.cells[index];

const compare = (one, other) => {
  const [a, b] = [one.dataset.value, other.dataset.value];
  const [known, alsoKnown] = [a !== undefined, b !== undefined];
  if (known && alsoKnown) return Number(a) - Number(b);
  return one.textContent.trim().localeCompare(other.textContent.trim(), "en", { numeric: true });
};

const sort = (table, heading, direction) => {
  const index = heading.cellIndex;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const numeric = rows.some((row) => column(row, index).dataset.value !== undefined);
  const unknown = (row) => numeric && column(row, index).dataset.value === undefined;
  const sign = direction === "ascending" ? 1 : -1;
  rows.sort((a, b) => {
    if (unknown(a) !== unknown(b)) return unknown(a) ? 1 : -1;
    return sign * compare(column(a, index), column(b, index));
  });
  body.append(...rows);
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction);
  document.getElementById("sorted").textContent =
    `${table.caption.textContent}: sorted by ${heading.textContent}, ${direction}`;
};

for (const table of document.querySelectorAll("table.sortable")) {
  for (const heading of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const best = heading.classList.contains("text") ? "ascending" : "descending";
      const worst = best === "ascending" ? "descending" : "ascending";
      sort(table, heading, heading.getAttribute("aria-sort") === best ? worst : best);
    });
  }
}

// A link to something folded away unfolds it.
const unfold = () => {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", unfold);
if (location.hash) unfold();

// On paper parts are unfolded, but for what takes pages or says a thing twice: as the reader left it.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open], .more, .wall, .lengthy, .hint, .full)")];
  for (const part of folded) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
});

// The contents say where the reader is.
const links = new Map(
  [...document.querySelectorAll("nav.contents a")].map((a) => [a.hash.slice(1), a]),
);
const parts = [...links.keys()].map((id) => document.getElementById(id)).filter(Boolean);
const mark = () => {
  const line = innerHeight / 4;
  const above = parts.filter((part) => part.getBoundingClientRect().top <= line);
  const here = above.at(-1) ?? parts[0];
  for (const [id, link] of links) {
    if (here && id === here.id) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
};
let waiting = false;
addEventListener("scroll", () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    mark();
  });
}, { passive: true });
mark();
