"use strict";
// Selection of results with checkboxes, keys or a rubber band, and the bar with actions for the selected images.

const MAX_ZIP_IMAGES = 200; // maximum number of images in a zip; the server has the same limit
const MIN_DRAG = 8; // in CSS pixels; shorter movements are clicks
const SCROLL_MARGIN = 32; // in CSS pixels; closer to the edge of the window, dragging scrolls the page
const selected = new Map(); // hit id -> hit, in the order of selection; kept when the user searches again
let anchor = -1; // index of the result from which Shift extends the selection

// ---- selection ------------------------------------------------------------------------------------------------------

function makeCheckbox(hit, index) {
  const label = document.createElement("label"), checkbox = document.createElement("input");
  label.className = "mark";
  checkbox.type = "checkbox";
  checkbox.tabIndex = -1; // x and the space key select the focused image
  checkbox.checked = selected.has(hit.id);
  checkbox.setAttribute("aria-label", `Select ${getFileName(hit.images[0])}`);
  checkbox.addEventListener("click", (event) => toggleSelected(index, event.shiftKey));
  label.append(checkbox);
  return label;
}

function setSelected(index, isSelected) {
  const hit = hits[index], tile = getTile(index);
  if (isSelected) selected.set(hit.id, hit);
  else selected.delete(hit.id);
  tile.classList.toggle("selected", isSelected);
  tile.querySelector("input").checked = isSelected;
}

function toggleSelected(index, extend = false) {
  if (extend && anchor >= 0 && anchor < hits.length) {
    extendSelection(anchor, index);
    return;
  }
  anchor = index;
  setSelected(index, !selected.has(hits[index].id));
  showSelection();
}

function extendSelection(from, to) {
  if (anchor < 0 || anchor >= hits.length) anchor = from;
  for (let index = Math.min(from, to); index <= Math.max(from, to); index++) setSelected(index, true);
  showSelection();
}

function clearSelection() {
  for (const tile of $("grid").querySelectorAll(".selected")) {
    tile.classList.remove("selected");
    tile.querySelector("input").checked = false;
  }
  selected.clear();
  anchor = -1;
  showSelection();
}

function showSelection() {
  const count = selected.size;
  $("selection").hidden = count === 0;
  document.body.classList.toggle("selecting", count > 0);
  $("selection-count").textContent = count === 1 ? "1 image selected" : `${count} images selected`;
  const limits = { "selection-like": MAX_IMAGES, "selection-unlike": MAX_IMAGES, "selection-zip": MAX_ZIP_IMAGES };
  for (const [id, limit] of Object.entries(limits)) {
    $(id).disabled = count > limit;
    $(id).title = count > limit ? `For at most ${limit} images` : "";
  }
  showOpenSelection();
}

function showOpenSelection() {
  // The button in the detail view shows whether the open image is selected.
  const isSelected = openIndex >= 0 && openIndex < hits.length && selected.has(hits[openIndex].id);
  $("select").setAttribute("aria-pressed", String(isSelected));
}

// ---- actions --------------------------------------------------------------------------------------------------------

function searchLikeSelection(searchLike) {
  if (searchLike([...selected.values()])) clearSelection();
}

function makeCsv(selectedHits) {
  // Spreadsheets run cells that begin with these characters as formulas, so an apostrophe is put in front of them.
  const quote = (text) => `"${text.replace(/^(?=[=+\-@\t\r])/, "'").replaceAll('"', '""')}"`;
  const rows = [["id", "name", "captions"]];
  for (const hit of selectedHits) {
    for (const image of hit.images) rows.push([hit.id, image.name, image.captions.join("\n")]);
  }
  const lines = rows.map((row) => row.map(quote).join(",") + "\r\n");
  return `\ufeff${lines.join("")}`; // the byte order mark tells spreadsheets that the file is in UTF-8
}

function exportList() {
  const url = URL.createObjectURL(new Blob([makeCsv(selected.values())], { type: "text/csv" }));
  downloadUrl(url, "images.csv");
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function downloadUrl(url, name) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}

$("selection-like").addEventListener("click", () => searchLikeSelection(searchMoreLike));
$("selection-unlike").addEventListener("click", () => searchLikeSelection(searchLessLike));
$("selection-export").addEventListener("click", exportList);
$("selection-zip").addEventListener("click", () => {
  downloadUrl(`/zip?${new URLSearchParams({ ids: [...selected.keys()].join(",") })}`, "images.zip");
});
$("selection-clear").addEventListener("click", () => {
  clearSelection();
  tabStop?.focus(); // the focused button is now hidden
});
$("select").addEventListener("click", () => toggleSelected(openIndex));

// ---- rubber band ----------------------------------------------------------------------------------------------------

let drag = null; // position at which the mouse button was pressed, in page coordinates, and the tiles if it has moved

function measureTiles() {
  return [...$("grid").children].map((tile) => {
    const box = tile.getBoundingClientRect();
    return { left: box.left + scrollX, right: box.right + scrollX, top: box.top + scrollY, bottom: box.bottom + scrollY };
  });
}

function updateBand(event) {
  const x = event.clientX + scrollX, y = event.clientY + scrollY;
  if (!drag.tiles) {
    if (Math.hypot(x - drag.x, y - drag.y) < MIN_DRAG) return;
    drag.before = new Set(selected.keys());
    getSelection().removeAllRanges();
    document.body.classList.add("dragging");
    $("band").hidden = false;
  }
  if (drag.tiles?.length !== hits.length) drag.tiles = measureTiles(); // scrolling may have loaded more results
  const left = Math.min(x, drag.x), right = Math.max(x, drag.x), top = Math.min(y, drag.y), bottom = Math.max(y, drag.y);
  const position = { left: left - scrollX, top: top - scrollY, width: right - left, height: bottom - top };
  for (const [name, value] of Object.entries(position)) $("band").style[name] = `${value}px`;
  drag.tiles.forEach((tile, index) => {
    const isInside = tile.left < right && tile.right > left && tile.top < bottom && tile.bottom > top;
    const isSelected = isInside || drag.before.has(hits[index].id);
    if (isSelected !== selected.has(hits[index].id)) setSelected(index, isSelected);
  });
  showSelection();
  if (event.clientY < SCROLL_MARGIN) scrollBy(0, -SCROLL_MARGIN);
  if (event.clientY > innerHeight - SCROLL_MARGIN) scrollBy(0, SCROLL_MARGIN);
}

function endDrag() {
  if (drag?.tiles) {
    document.body.classList.remove("dragging");
    $("band").hidden = true;
    // The mouse button was released over a result, which must not open.
    const ignoreClick = (event) => { event.preventDefault(); event.stopPropagation(); };
    addEventListener("click", ignoreClick, { capture: true, once: true });
    setTimeout(() => removeEventListener("click", ignoreClick, { capture: true }));
  }
  drag = null;
}

document.querySelector("main").addEventListener("pointerdown", (event) => {
  const isOnGrid = event.target.matches("main, #grid, #grid *") && !event.target.closest(".mark");
  if (event.pointerType === "mouse" && event.button === 0 && isOnGrid && hits.length) {
    drag = { x: event.clientX + scrollX, y: event.clientY + scrollY, tiles: null, before: null };
  }
});
addEventListener("pointermove", (event) => { if (drag) updateBand(event); });
addEventListener("pointerup", endDrag);
addEventListener("pointercancel", endDrag);
