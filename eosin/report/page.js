"use strict";
// Sorts and filters tables, and enlarges pictures; the page is complete without it.

const number = (text) => {
  const found = text.replace(/,/g, "").match(/^[-+−]?[\d.]+(e[-+]?\d+)?/i);
  return found ? Number(found[0].replace("−", "-")) : NaN;
};

function compare(one, other) {
  const [a, b] = [number(one), number(other)];
  if (Number.isNaN(a) || Number.isNaN(b)) {
    return Number.isNaN(a) - Number.isNaN(b) || one.localeCompare(other, undefined, { numeric: true });
  }
  return a - b;
}

function sortBy(table, column, head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const text = (row) => row.cells[column].textContent.trim();
  const rows = [...table.tBodies[0].rows].sort((a, b) => compare(text(a), text(b)) * (down ? -1 : 1));
  table.tBodies[0].append(...rows);
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.tabIndex = 0;
    head.title = "Sort";
    head.addEventListener("click", () => sortBy(table, column, head));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        sortBy(table, column, head);
      }
    });
  });
}

function makeFilter(rows, before, what) {
  const label = document.createElement("label");
  const field = Object.assign(document.createElement("input"), { type: "search", placeholder: `Filter ${what}` });
  field.setAttribute("aria-label", field.placeholder);
  const count = document.createElement("span");
  label.className = "filter";
  label.append(field, count);
  before.before(label);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = field.value ? `${shown} of ${rows.length}` : "";
  });
}

function makeLarge(images) {
  const box = document.createElement("dialog");
  const picture = document.createElement("img");
  const words = document.createElement("p");
  document.body.append(box);
  let place = 0;
  const show = (next) => {
    place = (next + images.length) % images.length;
    picture.src = images[place].src;
    picture.alt = words.textContent = images[place].alt;
    box.replaceChildren(picture, words);
    if (!box.open) box.showModal();
  };
  images.forEach((image, index) => {
    image.tabIndex = 0;
    image.classList.add("large");
    image.addEventListener("click", () => show(index));
    image.addEventListener("keydown", (event) => event.key === "Enter" && show(index));
  });
  box.addEventListener("click", () => box.close());
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") show(place + 1);
    if (event.key === "ArrowLeft") show(place - 1);
  });
}

for (const table of document.querySelectorAll("table.grid")) {
  makeSortable(table);
  if (table.tBodies[0].rows.length > 8) makeFilter([...table.tBodies[0].rows], table.parentElement, "rows");
}
for (const cards of document.querySelectorAll(".slides")) {
  const found = [...cards.children];
  if (found.length > 8) makeFilter(found, cards, "slides");
}
makeLarge([...document.querySelectorAll("figure > img")]);
for (const code of document.querySelectorAll("code.command")) {
  code.title = "Click to select";
  code.addEventListener("click", () => getSelection().selectAllChildren(code));
}
